//! Tells when the configuration file has changed, however it was: written, replaced by an editor's rename, or
//! by a ConfigMap's symbolic link that leads elsewhere.
//!
//! inotify(7) on the directories says when to look; what counts is whether another file is found then.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::{Errno, read};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

/// A change is over when nothing happens for so long, and is not waited for longer than the other.
const QUIET: Duration = Duration::from_millis(100);
const LONGEST_CHANGE: Duration = Duration::from_secs(1);
/// How often to look where nobody tells.
const LOOK: Duration = Duration::from_secs(2);

/// Watches one file.
pub(super) struct Watch {
    file: PathBuf,
    /// What was there when it was last looked at.
    seen: Option<Identity>,
    events: Option<AsyncFd<OwnedFd>>,
    /// The directories that tell of themselves.
    watched: HashSet<i32>,
}

/// What tells a file from the one before it.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Watch {
    pub(super) fn new(file: PathBuf) -> Self {
        let events = events().inspect_err(|error| {
            let every = LOOK.as_secs();
            warn!("cannot watch {}: {error}; it is looked at every {every} s", file.display());
        });
        let mut watch =
            Self { seen: identity(&file), file, events: events.ok(), watched: HashSet::new() };
        watch.watch_directories();
        watch
    }

    /// Resolves when there is another file than when it was last looked at.
    pub(super) async fn changed(&mut self) {
        loop {
            self.event().await;
            let begun = Instant::now();
            while begun.elapsed() < LONGEST_CHANGE && timeout(QUIET, self.event()).await.is_ok() {}
            self.watch_directories();
            if identity(&self.file) != self.seen {
                return;
            }
        }
    }

    /// What is there now is known.
    pub(super) fn look(&mut self) {
        self.seen = identity(&self.file);
    }

    /// Something has happened, or it is time to look.
    async fn event(&self) {
        match &self.events {
            Some(events) if !self.watched.is_empty() => {
                let drain = |events: &OwnedFd| {
                    let mut buffer = [0; 4096];
                    while read(events, &mut buffer)? > 0 {}
                    Ok(())
                };
                // Which event it was does not matter.
                while let Ok(mut guard) = events.readable().await {
                    if guard.try_io(|events| drain(events.get_ref())).is_err() {
                        return;
                    }
                }
            }
            _ => sleep(LOOK).await,
        }
    }

    /// Watches where the file is, and where its links lead.
    fn watch_directories(&mut self) {
        let Some(events) = &self.events else { return };
        let flags = WatchFlags::CLOSE_WRITE
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        let found = self.file.canonicalize().ok();
        let files = [Some(&self.file), found.as_ref()].into_iter().flatten();
        // The same directory has the same number again.
        let now: HashSet<_> = files
            .filter_map(|file| inotify::add_watch(events.get_ref(), directory(file), flags).ok())
            .collect();
        for gone in self.watched.difference(&now) {
            // It fails if the directory itself is gone.
            let _: Result<(), Errno> = inotify::remove_watch(events.get_ref(), *gone);
        }
        self.watched = now;
    }
}

fn events() -> io::Result<AsyncFd<OwnedFd>> {
    let events = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    // SAFETY: an owned descriptor shows the same one for as long as it lives.
    unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) }.map_err(io::Error::from)
}

fn directory(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn identity(file: &Path) -> Option<Identity> {
    let found = std::fs::metadata(file).ok()?;
    Some(Identity {
        device: found.dev(),
        inode: found.ino(),
        size: found.size(),
        modified: (found.mtime(), found.mtime_nsec()),
        changed: (found.ctime(), found.ctime_nsec()),
    })
}

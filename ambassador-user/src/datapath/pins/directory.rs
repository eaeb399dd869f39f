//! A directory of a bpffs, held open: whoever owns a part of the tree cannot put a symbolic link where a
//! privileged process is about to make, give away or remove something.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::fs::{StatVfsMountFlags, fstatvfs};

use crate::datapath::mounts;
use crate::privileges;

#[derive(Debug)]
pub(super) struct Directory {
    /// For people, and for what its parent is asked to do with it.
    pub(super) path: PathBuf,
    file: File,
}

/// Where the instances of this machine are, if a bpffs is mounted.
pub(super) fn of_all_instances() -> Result<Option<PathBuf>> {
    Ok(among(&mounts::read()?))
}

/// A mount of nothing but our part of the bpffs is meant for us. One on a node may be closed to all but
/// root, and a profile of AppArmor may forbid to write below /sys.
fn among(mounts: &str) -> Option<PathBuf> {
    let mut found = None;
    for (root, place) in mounts::of("bpf", mounts) {
        if root == "/ambassador" {
            return Some(place.to_owned());
        }
        if root == "/" && (found.is_none() || place == Path::new("/sys/fs/bpf")) {
            found = Some(place.join("ambassador"));
        }
    }
    found
}

impl Directory {
    /// None if it is not there; an error if it is no directory, but a link to one.
    pub(super) fn open(path: PathBuf) -> Result<Option<Self>> {
        Self::open_by(&path, path.clone())
    }

    /// One that is in this one.
    pub(super) fn sub(&self, name: &str) -> Result<Option<Self>> {
        Self::open_by(&self.entry(name), self.path.join(name))
    }

    fn open_by(way: &Path, path: PathBuf) -> Result<Option<Self>> {
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        match OpenOptions::new().read(true).custom_flags(flags).open(way) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            opened => {
                let file = opened.with_context(|| format!("open {}", path.display()))?;
                Ok(Some(Self { path, file }))
            }
        }
    }

    /// Makes one in this one, unless it is there, and opens it.
    pub(super) fn make(&self, name: &str, mode: u32) -> Result<Self> {
        Self::make_by(&self.entry(name), self.path.join(name), mode)
    }

    /// That of all instances: as /tmp, since ambassadors of several users may share a node's bpffs.
    pub(super) fn make_of_all_instances(path: PathBuf) -> Result<Self> {
        const LIKE_TMP: u32 = 0o1777;
        let made = Self::make_by(&path, path.clone(), LIKE_TMP)?;
        let mount = fstatvfs(&made.file).with_context(|| format!("look at {}", path.display()))?;
        ensure!(
            !mount.f_flag.contains(StatVfsMountFlags::RDONLY),
            "{} is mounted read-only; mount it without readOnly: true (volumeMount host-bpf)",
            path.display()
        );
        // Where the kubelet made it, it is closed to the ambassador's user, who is to leave nothing there.
        if let Ok(found) = made.file.metadata()
            && found.uid() == privileges::effective_user()
            && found.mode() & 0o7777 != LIKE_TMP
        {
            made.set_mode(LIKE_TMP)?;
        }
        Ok(made)
    }

    fn make_by(way: &Path, path: PathBuf, mode: u32) -> Result<Self> {
        let made = match DirBuilder::new().mode(mode).create(way) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
            made => made.map(|()| true).with_context(|| format!("make {}", path.display()))?,
        };
        let directory = Self::open_by(way, path)?.context("open what was just made")?;
        // The umask may have taken some of it.
        if made {
            directory.set_mode(mode)?;
        }
        Ok(directory)
    }

    fn set_mode(&self, mode: u32) -> Result<()> {
        self.file
            .set_permissions(Permissions::from_mode(mode))
            .with_context(|| format!("open {} to others", self.path.display()))
    }

    /// A way to an entry that leads through what is open, whatever has become of the path.
    pub(super) fn entry(&self, name: impl AsRef<Path>) -> PathBuf {
        Path::new("/proc/self/fd").join(self.file.as_raw_fd().to_string()).join(name)
    }

    pub(super) fn names(&self) -> Result<Vec<OsString>> {
        let entries = fs::read_dir(self.entry(""))
            .with_context(|| format!("list {}", self.path.display()))?;
        let names = entries.map(|entry| Ok(entry.context("list pins")?.file_name()));
        names.collect()
    }

    /// Gives it to a user, who may then remove what is in it, as may the group that it has.
    pub(super) fn give(&self, uid: u32, gid: Option<u32>, mode: u32) -> Result<()> {
        // While it is ours: later that would take CAP_FOWNER.
        self.set_mode(mode)?;
        fchown(&self.file, Some(uid), gid).with_context(|| {
            format!("give {} to user {uid}, which may take CAP_CHOWN", self.path.display())
        })
    }

    /// Locks it for as long as it is open, unless somebody else has; says whether.
    pub(super) fn lock(&self) -> bool {
        // SAFETY: a system call on a descriptor that is open.
        unsafe { libc::flock(self.file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
    }

    /// Whether nothing has come or gone in it for so long.
    pub(super) fn is_older_than(&self, age: Duration) -> Result<bool> {
        let modified = self.file.metadata().and_then(|found| found.modified());
        let modified = modified.with_context(|| format!("look at {}", self.path.display()))?;
        Ok(modified.elapsed().is_ok_and(|elapsed| elapsed > age))
    }

    /// Removes a directory that is in this one, if it is there.
    pub(super) fn remove(&self, name: &str) -> Result<()> {
        remove(&self.entry(name))
            .with_context(|| format!("remove {}", self.path.join(name).display()))
    }

    /// Removes this one itself.
    pub(super) fn remove_self(&self) -> Result<()> {
        remove(&self.path).with_context(|| format!("remove {}", self.path.display()))
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_link_is_no_directory() {
        let place = tempfile::tempdir().unwrap();
        let (real, link) = (place.path().join("real"), place.path().join("link"));
        fs::create_dir(&real).unwrap();
        symlink(&real, &link).unwrap();
        let parent = Directory::open(place.path().to_owned()).unwrap().unwrap();
        assert!(parent.sub("real").unwrap().is_some());
        assert!(parent.sub("nothing").unwrap().is_none());
        parent.sub("link").unwrap_err();
        parent.make("link", 0o755).unwrap_err();
        Directory::open(link).unwrap_err();
    }

    #[test]
    fn what_is_open_stays_what_it_was() {
        let place = tempfile::tempdir().unwrap();
        let parent = Directory::open(place.path().to_owned()).unwrap().unwrap();
        let held = parent.make("held", 0o755).unwrap();
        fs::rename(&held.path, place.path().join("moved")).unwrap();
        fs::create_dir(&held.path).unwrap();
        held.make("in it", 0o700).unwrap();
        assert!(
            place.path().join("moved/in it").exists() && !place.path().join("held/in it").exists()
        );
    }

    #[test]
    fn the_mount_of_our_part_is_preferred() {
        let line = |root: &str, place: &str, kind: &str| {
            format!("30 23 0:26 {root} {place} rw,nosuid - {kind} {kind} rw,mode=700\n")
        };
        let host = line("/", "/sys/fs/bpf", "bpf");
        let found = |mounts: &[&str]| among(&mounts.concat());
        assert_eq!(found(&[&line("/", "/sys/fs/bpf", "sysfs")]), None);
        assert_eq!(found(&[&host]), Some("/sys/fs/bpf/ambassador".into()));
        let other = line("/", "/run/bpf", "bpf");
        assert_eq!(found(&[&other]), Some("/run/bpf/ambassador".into()));
        assert_eq!(found(&[&other, &host, &other]), Some("/sys/fs/bpf/ambassador".into()));
        let ours = line("/ambassador", "/host/bpf", "bpf");
        assert_eq!(found(&[&host, &ours, &other]), Some("/host/bpf".into()));
        assert_eq!(found(&[&line("/cilium", "/host/bpf", "bpf")]), None);
    }
}

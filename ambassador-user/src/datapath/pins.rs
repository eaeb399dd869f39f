//! What stays in the kernel without a process: maps and attachments pinned below bpffs, one directory
//! an instance.
//!
//! ```text
//! /sys/fs/bpf/ambassador/INSTANCE/maps/NAME    files of the user who runs the ambassador, mode 0600
//!                                 links/NAME   files of whoever loaded it: only they detach
//!                                 lock/        that user's directory, mode 0700
//!                        INSTANCE~/            the same, until it takes the place of INSTANCE
//! ```
//! The files' owner and mode are the boundary: whoever may open a map's file may change the map. Whoever
//! runs an instance has its lock/ locked, which nobody else may open.

use std::ffi::CString;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use aya::maps::{Map, MapData};

use super::programs::{Links, Maps};

/// All instances.
pub const DIRECTORY: &str = "/sys/fs/bpf/ambassador";
/// In the directory of an instance.
const LOCK: &str = "lock";

/// An instance's directory, locked while this lives.
#[derive(Debug)]
pub struct Pins {
    directory: PathBuf,
    _lock: File,
    /// Made by this process, for which it may yet turn out that nobody will serve it: removed when
    /// dropped. Where it is to be.
    provisional: Option<PathBuf>,
}

/// Who may use what is pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

impl Pins {
    /// Whether there are any of an instance.
    pub fn exist(instance: &str) -> bool {
        Path::new(DIRECTORY).join(instance).exists()
    }

    /// Those of an instance, if there are any.
    pub fn find(instance: &str) -> Result<Option<Self>> {
        let directory = Path::new(DIRECTORY).join(instance);
        Self::exist(instance).then(|| Self::lock(directory)).transpose()
    }

    /// All there is of an instance, with what somebody who was killed did not finish.
    pub fn all(instance: &str) -> Result<Vec<Self>> {
        let names = [instance.to_owned(), unfinished(instance)];
        names.iter().filter_map(|name| Self::find(name).transpose()).collect()
    }

    /// Pins maps and links for a user, beside what may be there, until [`Pins::outlive`].
    pub fn make(instance: &str, maps: &Maps, links: Links, owner: Owner) -> Result<Self> {
        // As /tmp: ambassadors of several users may share a node's bpffs.
        make_directory(Path::new(DIRECTORY), 0o1777)?;
        let beside = Path::new(DIRECTORY).join(unfinished(instance));
        make_directory(&beside, 0o755)?;
        let mut pins = Self::lock(beside)?;
        pins.provisional = Some(Path::new(DIRECTORY).join(instance));
        // Of somebody who was killed before it was in place.
        pins.remove_parts()?;
        pins.fill(maps, links, owner)?;
        Ok(pins)
    }

    /// All instances that nobody runs, and that act on nothing any more or never will again.
    pub fn stale() -> Result<Vec<Self>> {
        let entries = match fs::read_dir(DIRECTORY) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(|| format!("list {DIRECTORY}"))?,
        };
        let mut stale = Vec::new();
        for entry in entries {
            let name = entry.context("list instances")?.file_name();
            // One that is locked is run by somebody.
            if let Some(name) = name.to_str()
                && let Ok(Some(pins)) = Self::find(name)
                && pins.acts_on_nothing()?
            {
                stale.push(pins);
            }
        }
        Ok(stale)
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The maps, for a user who may open them.
    pub fn maps(&self) -> Result<Maps> {
        let mut maps = Maps::default();
        for path in list(&self.directory.join("maps"))? {
            let open = || Ok(Map::from_map_data(MapData::from_pin(&path)?)?);
            let map = open().map_err(|error: anyhow::Error| {
                error.context(format!(
                    "open {} (it belongs to the user that `ambassador load --for` named)",
                    path.display()
                ))
            })?;
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            maps.0.insert(name, map);
        }
        Ok(maps)
    }

    /// From now on they stay when this is dropped, however the process ends; in the place of these, if
    /// there were any.
    pub fn outlive(&mut self, before: Option<Self>) -> Result<()> {
        let Some(place) = self.provisional.clone() else { return Ok(()) };
        let moved = match &before {
            // Whoever looks finds the one or the other.
            Some(_) => exchange(&self.directory, &place).context("which takes Linux 5.17 or later"),
            None => fs::rename(&self.directory, &place).map_err(anyhow::Error::new),
        };
        moved.with_context(|| format!("put what was loaded into {}", place.display()))?;
        self.provisional = None;
        let beside = std::mem::replace(&mut self.directory, place);
        let Some(mut before) = before else { return Ok(()) };
        before.directory = beside;
        before.remove()
    }

    /// Detaches and removes all; connections that are open stay.
    pub fn remove(mut self) -> Result<()> {
        self.provisional = None;
        self.remove_files()
    }

    fn remove_files(&self) -> Result<()> {
        self.remove_parts()?;
        remove_directory(&self.directory.join(LOCK))?;
        remove_directory(&self.directory)?;
        // The last one out. Others may be there, or come just now.
        let _ = fs::remove_dir(DIRECTORY);
        Ok(())
    }

    fn remove_parts(&self) -> Result<()> {
        for part in ["links", "maps"] {
            let part = self.directory.join(part);
            for path in list(&part)? {
                fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
            }
            remove_directory(&part)?;
        }
        Ok(())
    }

    fn lock(directory: PathBuf) -> Result<Self> {
        let path = directory.join(LOCK);
        // Somebody may have been killed before there was one.
        make_directory(&path, 0o700)?;
        let lock = File::open(&path).with_context(|| {
            format!(
                "open {} (it belongs to the user that `ambassador load --for` named; others take \
                 CAP_DAC_READ_SEARCH)",
                path.display()
            )
        })?;
        // SAFETY: a system call on a descriptor that is open.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            bail!(
                "{} is in use by another ambassador; give each its own --instance",
                directory.display()
            );
        }
        Ok(Self { directory, _lock: lock, provisional: None })
    }

    fn fill(&self, maps: &Maps, links: Links, Owner { uid, gid }: Owner) -> Result<()> {
        let give = |path: &Path| {
            chown(path, Some(uid), Some(gid)).with_context(|| {
                format!("give {} to user {uid}, which may take CAP_CHOWN", path.display())
            })
        };
        give(&self.directory.join(LOCK))?;
        let (of_maps, of_links) = (self.directory.join("maps"), self.directory.join("links"));
        make_directory(&of_maps, 0o755)?;
        make_directory(&of_links, 0o700)?;
        // Names with a dot are variables that only programs read.
        for (name, map) in maps.0.iter().filter(|(name, _)| !name.contains('.')) {
            let path = of_maps.join(name);
            map.pin(&path).with_context(|| format!("pin {}", path.display()))?;
            // While it is ours: later that would take CAP_FOWNER.
            fs::set_permissions(&path, Permissions::from_mode(0o600))
                .with_context(|| format!("keep others from {}", path.display()))?;
            give(&path)?;
        }
        // The map that it is attached to is pinned.
        std::mem::forget(links.to_sockets);
        for (name, link) in links.to_cgroup {
            let path = of_links.join(name);
            link.pin(&path).with_context(|| format!("pin {}", path.display()))?;
        }
        Ok(())
    }

    /// Whether the cgroup that the programs were attached to is gone.
    fn acts_on_nothing(&self) -> Result<bool> {
        for path in list(&self.directory.join("links"))? {
            if cgroup_of(&path)? != 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        if self.provisional.is_some()
            && let Err(error) = self.remove_files()
        {
            tracing::warn!("cannot take back what was pinned: {error:#}");
        }
    }
}

/// The directory of an instance that is being made: no instance has such a name.
fn unfinished(instance: &str) -> String {
    format!("{instance}~")
}

/// The inode of the cgroup that a pinned link attaches to; 0 when it is gone.
fn cgroup_of(pin: &Path) -> Result<u64> {
    let link = open(pin).with_context(|| format!("open {}", pin.display()))?;
    // What aya tells of a link leaves this out.
    let info = format!("/proc/self/fdinfo/{}", link.as_raw_fd());
    let info = fs::read_to_string(&info).with_context(|| format!("read {info}"))?;
    let id = info.lines().find_map(|line| line.strip_prefix("cgroup_id:"));
    id.context("find the cgroup of a link")?.trim().parse().context("read the cgroup of a link")
}

/// bpf(2) `BPF_OBJ_GET`, for what aya wraps without showing its descriptor.
fn open(pin: &Path) -> Result<OwnedFd> {
    /// The part of `union bpf_attr` that this command reads.
    #[repr(C)]
    struct Attributes {
        path: u64,
        descriptor: u32,
        flags: u32,
    }
    const BPF_OBJ_GET: libc::c_int = 7;

    let path = CString::new(pin.as_os_str().as_bytes()).context("name a pin")?;
    let attributes = Attributes { path: path.as_ptr() as u64, descriptor: 0, flags: 0 };
    // SAFETY: both pointers are to what lives until the call returns.
    let opened = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const attributes, size_of::<Attributes>())
    };
    let opened = i32::try_from(opened).unwrap_or(-1);
    if opened < 0 {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(opened) })
}

/// The files of a directory; none if it is not there.
fn list(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("list {}", directory.display()))?,
    };
    let paths = entries.map(|entry| Ok(entry.context("list pins")?.path()));
    paths.collect()
}

/// Has each of two directories take the place of the other.
fn exchange(one: &Path, other: &Path) -> Result<()> {
    let name = |path: &Path| CString::new(path.as_os_str().as_bytes()).context("name a directory");
    let (one, other) = (name(one)?, name(other)?);
    // SAFETY: both names live until the call returns.
    let failed = unsafe {
        libc::renameat2(
            libc::AT_FDCWD,
            one.as_ptr(),
            libc::AT_FDCWD,
            other.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error().into());
    }
    Ok(())
}

fn remove_directory(path: &Path) -> Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed.with_context(|| format!("remove {}", path.display())),
    }
}

fn make_directory(path: &Path, mode: u32) -> Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error).with_context(|| format!("make {}", path.display())),
        // The umask may have taken some of it.
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(mode))
            .with_context(|| format!("open {} to others", path.display())),
    }
}

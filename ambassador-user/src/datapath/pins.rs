//! What stays in the kernel without a process: maps and attachments pinned below a bpffs, one directory
//! an instance.
//!
//! ```text
//! /sys/fs/bpf/ambassador/INSTANCE/maps/NAME    files of the user who runs the ambassador, mode 0600
//!                                 links/NAME   files of whoever loaded it, in that user's directory
//!                                 lock/        that user's directory, mode 0700
//!                        INSTANCE~/            the same, until it takes the place of INSTANCE
//! ```
//! The files' owner and mode are the boundary: whoever may open a map's file may change the map. Whoever
//! runs an instance has its lock/ locked, which nobody else may open. The directories are that user's, so
//! that its clean end leaves nothing behind, and of the loader's group, so that a loader can tidy up.

mod directory;

use std::ffi::CString;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use aya::maps::{Map, MapData};

use self::directory::Directory;
use super::programs::{Links, Maps};
use crate::privileges;

/// In the directory of an instance.
const LOCK: &str = "lock";
const MAPS: &str = "maps";
const LINKS: &str = "links";

/// Somebody may be about to fill a directory that is younger.
const ABANDONED: Duration = Duration::from_secs(60);

/// An instance's directory, locked while this lives.
#[derive(Debug)]
pub struct Pins {
    directory: Directory,
    lock: Directory,
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
        matches!(directory::of_all_instances(), Ok(Some(all)) if all.join(instance).exists())
    }

    /// Those of an instance, if there are any.
    pub fn find(instance: &str) -> Result<Option<Self>> {
        let Some(all) = directory::of_all_instances()? else { return Ok(None) };
        Directory::open(all.join(instance))?.map(Self::lock).transpose()
    }

    /// All there is of an instance, with what somebody who was killed did not finish.
    pub fn all(instance: &str) -> Result<Vec<Self>> {
        let names = [instance.to_owned(), unfinished(instance)];
        names.iter().filter_map(|name| Self::find(name).transpose()).collect()
    }

    /// Pins maps and links for a user, beside what may be there, until [`Pins::outlive`].
    pub fn make(instance: &str, maps: &Maps, links: Links, owner: Owner) -> Result<Self> {
        let all = directory::of_all_instances()?.context(
            "no bpffs is mounted here; mount hostPath /sys/fs/bpf/ambassador (DirectoryOrCreate) at /host/bpf \
             (volume host-bpf), where the node has a bpffs: `mount -t bpf bpf /sys/fs/bpf`",
        )?;
        let all = Directory::make_of_all_instances(all)?;
        let beside = unfinished(instance);
        // Of somebody who was killed before it was in place.
        if let Some(abandoned) = all.sub(&beside)? {
            Self::lock(abandoned)?.remove()?;
        }
        let mut pins = Self::lock(all.make(&beside, 0o755)?)?;
        pins.provisional = Some(all.path.join(instance));
        pins.fill(maps, links, owner)?;
        Ok(pins)
    }

    /// Removes all instances that nobody runs, and that act on nothing any more or never will again; says
    /// which.
    pub fn remove_stale() -> Result<Vec<PathBuf>> {
        let all = directory::of_all_instances()?.map(Directory::open).transpose()?.flatten();
        let Some(all) = all else { return Ok(Vec::new()) };
        let mut removed = Vec::new();
        for name in all.names()? {
            // One that is locked is run by somebody, and one that is not ours to open is left to others.
            if let Some(name) = name.to_str()
                && let Ok(Some(directory)) = all.sub(name)
                && let Ok(pins) = Self::lock(directory)
                && let Ok(true) = pins.acts_on_nothing()
            {
                let path = pins.directory().to_owned();
                pins.remove()?;
                removed.push(path);
            }
        }
        Ok(removed)
    }

    pub fn directory(&self) -> &Path {
        &self.directory.path
    }

    /// The maps, for a user who may open them.
    pub fn maps(&self) -> Result<Maps> {
        let mut maps = Maps::default();
        let Some(of_maps) = self.directory.sub(MAPS)? else { return Ok(maps) };
        for name in of_maps.names()? {
            let open = || Ok(Map::from_map_data(MapData::from_pin(of_maps.entry(&name))?)?);
            let map = open().map_err(|error: anyhow::Error| {
                error.context(format!(
                    "open {} (it belongs to the user that `ambassador load --for` named)",
                    of_maps.path.join(&name).display()
                ))
            })?;
            maps.0.insert(name.to_string_lossy().into_owned(), map);
        }
        Ok(maps)
    }

    /// From now on they stay when this is dropped, however the process ends; in the place of these, if
    /// there were any.
    pub fn outlive(&mut self, mut before: Option<Self>) -> Result<()> {
        let Some(place) = self.provisional.clone() else { return Ok(()) };
        let put = || format!("put what was loaded into {}", place.display());
        // Whoever looks finds the one or the other; on older kernels, for an instant, neither.
        if before.is_none() || !exchange(self.directory(), &place).with_context(put)? {
            before.take().map_or(Ok(()), Self::remove)?;
            fs::rename(self.directory(), &place).with_context(put)?;
        }
        self.provisional = None;
        let beside = std::mem::replace(&mut self.directory.path, place);
        if let Some(mut before) = before {
            before.directory.path = beside;
            // What has taken its place is in force all the same.
            if let Err(error) = before.remove() {
                tracing::warn!("something of what was pinned before is left: {error:#}");
            }
        }
        Ok(())
    }

    /// Whether this process can replace them without privileges too.
    pub fn are_ours_to_replace(&self) -> bool {
        let of_all = self.directory().parent().map(fs::metadata);
        let (Ok(own), Some(Ok(of_all))) = (fs::metadata(self.directory()), of_all) else {
            return false;
        };
        let user = privileges::effective_user();
        own.uid() == user || own.gid() == privileges::effective_group() && of_all.uid() == user
    }

    /// Detaches and removes all; connections that are open stay.
    pub fn remove(mut self) -> Result<()> {
        self.provisional = None;
        self.remove_files()
    }

    fn remove_files(&self) -> Result<()> {
        for part in [LINKS, MAPS] {
            let Some(directory) = self.directory.sub(part)? else { continue };
            let mut names = directory.names()?;
            // What redirects goes before what counts.
            names.sort();
            for name in names {
                if part == LINKS {
                    detach(&directory.entry(&name));
                }
                fs::remove_file(directory.entry(&name))
                    .with_context(|| format!("remove {}", directory.path.join(name).display()))?;
            }
            self.directory.remove(part)?;
        }
        self.directory.remove(LOCK)?;
        self.directory.remove_self()?;
        // The last one out. Others may be there, or come just now.
        let _ = self.directory().parent().map(fs::remove_dir);
        Ok(())
    }

    fn lock(directory: Directory) -> Result<Self> {
        // Somebody may have been killed before there was one.
        let lock = directory.make(LOCK, 0o700).with_context(|| {
            format!(
                "open {} (it belongs to the user that `ambassador load --for` named; others take \
                 CAP_DAC_READ_SEARCH)",
                directory.path.join(LOCK).display()
            )
        })?;
        if !lock.lock() {
            bail!(
                "{} is in use by another ambassador; give each its own --instance",
                directory.path.display()
            );
        }
        Ok(Self { directory, lock, provisional: None })
    }

    fn fill(&self, maps: &Maps, links: Links, Owner { uid, gid }: Owner) -> Result<()> {
        let of_maps = self.directory.make(MAPS, 0o755)?;
        let of_links = self.directory.make(LINKS, 0o700)?;
        // Names with a dot are variables that only programs read.
        for (name, map) in maps.0.iter().filter(|(name, _)| !name.contains('.')) {
            let (way, path) = (of_maps.entry(name), of_maps.path.join(name));
            map.pin(&way).with_context(|| format!("pin {}", path.display()))?;
            // While it is ours: later that would take CAP_FOWNER.
            fs::set_permissions(&way, Permissions::from_mode(0o600))
                .with_context(|| format!("keep others from {}", path.display()))?;
            chown(&way, Some(uid), Some(gid)).with_context(|| {
                format!("give {} to user {uid}, which may take CAP_CHOWN", path.display())
            })?;
        }
        // The map that it is attached to is pinned.
        std::mem::forget(links.to_sockets);
        for (name, link) in links.to_cgroup {
            let way = of_links.entry(name);
            let pinned = link.pin(&way);
            pinned.with_context(|| format!("pin {}", of_links.path.join(name).display()))?;
        }
        // Only now, when nothing more is made or given away in them.
        self.lock.give(uid, Some(gid), 0o700)?;
        of_maps.give(uid, None, 0o775)?;
        of_links.give(uid, None, 0o770)?;
        self.directory.give(uid, None, 0o775)
    }

    /// Whether the cgroup that the programs were attached to is gone.
    fn acts_on_nothing(&self) -> Result<bool> {
        let of_links = self.directory.sub(LINKS)?;
        let names = of_links.as_ref().map(Directory::names).transpose()?.unwrap_or_default();
        let Some(of_links) = of_links.filter(|_| !names.is_empty()) else {
            return self.directory.is_older_than(ABANDONED);
        };
        for name in names {
            if cgroup_of(&of_links.entry(name))? != 0 {
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

/// Detaches what a pinned link attaches, as far as it is ours to open. That goes with the pin as well, but in the
/// kernel's own time, in which what is to go would still redirect (kernel/bpf/syscall.c: `bpf_link_put`).
fn detach(pin: &Path) {
    /// The part of `union bpf_attr` that this command reads.
    #[repr(C)]
    struct Attributes {
        descriptor: u32,
    }
    const BPF_LINK_DETACH: libc::c_int = 34;

    let Ok(link) = open(pin) else { return };
    let attributes = Attributes { descriptor: link.as_raw_fd().cast_unsigned() };
    // One that fails changes nothing.
    // SAFETY: the attributes are those of the command, and point to nothing.
    let _ = unsafe { bpf(BPF_LINK_DETACH, &attributes) };
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
    // SAFETY: the attributes are those of the command, and the path lives until the call returns.
    let opened = unsafe { bpf(BPF_OBJ_GET, &attributes) }?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(opened) })
}

/// bpf(2), for what aya does not do.
///
/// # Safety
/// The attributes must be those that the command reads, and what they point to must live until it returns.
unsafe fn bpf<A>(command: libc::c_int, attributes: &A) -> io::Result<libc::c_int> {
    let attributes: *const A = attributes;
    // SAFETY: the caller's promise; the attributes themselves live throughout.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<A>()) };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has each of two directories take the place of the other; says whether this kernel can (Linux 5.17).
fn exchange(one: &Path, other: &Path) -> Result<bool> {
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
    if failed == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EINVAL) { Ok(false) } else { Err(error.into()) }
}

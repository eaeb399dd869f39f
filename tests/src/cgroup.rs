//! A control group of a test's own, to start processes in and attach programs to.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::wait::until_true;

/// A child of the cgroup v2 root. When dropped, it is removed with every process in it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes a group that no other test uses. Needs root.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ambassador-test-{}-{number}", std::process::id());
        let path = root()?.join(name);
        fs::create_dir(&path).with_context(|| format!("create cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// The group's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The group's directory, opened to attach programs to.
    pub fn open(&self) -> Result<File> {
        File::open(&self.path).with_context(|| format!("open cgroup {}", self.path.display()))
    }

    /// Makes a command start in the group: it has moved before its program begins.
    pub fn start_in(&self, command: &mut Command) -> Result<()> {
        let members = self.path.join("cgroup.procs");
        let mut members = File::options()
            .write(true)
            .open(&members)
            .with_context(|| format!("open {}", members.display()))?;
        // The kernel takes 0 for whoever writes it.
        let enter = move || members.write_all(b"0");
        // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
        unsafe { command.pre_exec(enter) };
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Kernels before 5.14 have no such file; the group must be empty by itself there.
        let _ = fs::write(self.path.join("cgroup.kill"), "1");
        let removed =
            until_true("the end of what lives in it", || match fs::remove_dir(&self.path) {
                Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(false),
                done => Ok(done.map(|()| true)?),
            });
        if let Err(error) = removed {
            eprintln!("remove cgroup {}: {error:#}", self.path.display());
        }
    }
}

/// Where the cgroup v2 hierarchy is mounted.
fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    mounts
        .lines()
        .map(|mount| mount.split(' ').collect::<Vec<_>>())
        .find(|mount| mount.get(2) == Some(&"cgroup2"))
        .map(|mount| PathBuf::from(mount[1]))
        .context("find a mounted cgroup v2 hierarchy in /proc/self/mounts")
}

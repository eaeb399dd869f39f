//! A control group of a test's own, to start processes in and attach programs to; and one for the
//! test process itself, whose sockets are the app's.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow, ensure};

use crate::wait::until_true;

/// What the name of every group of a test begins with.
const PREFIX: &str = "ambassador-test-";

/// A group of a test's own. When dropped, it is removed with every process in it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes a group that no other test uses, a child of the cgroup v2 root. Needs root.
    pub fn new() -> Result<Self> {
        Self::below(&root()?)
    }

    /// The same, as a child of this group.
    pub fn below(parent: &Path) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let path = parent.join(name);
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
        if let Err(error) = remove(&self.path) {
            eprintln!("remove cgroup {}: {error:#}", self.path.display());
        }
    }
}

/// Removes a group with every process in it, and those below it.
pub(crate) fn remove(group: &Path) -> Result<()> {
    // Kernels before 5.14 have no such file; the group must be empty by itself there.
    let _ = fs::write(group.join("cgroup.kill"), "1");
    until_true("the end of what lives in it", || {
        let below = fs::read_dir(group).into_iter().flatten().flatten();
        for below in below.map(|it| it.path()).filter(|it| it.is_dir()) {
            remove(&below)?;
        }
        match fs::remove_dir(group) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(false),
            // Somebody else was faster.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
            done => Ok(done.map(|()| true)?),
        }
    })
}

/// The group of this process, which is made and entered when it is first asked for; at its end the
/// process goes back to where it was. Needs root.
pub fn of_this_process() -> Result<&'static Path> {
    let own = OWN.get_or_init(|| Own::enter().map_err(|error| format!("{error:#}")));
    own.as_ref().map(|own| own.path.as_path()).map_err(|error| anyhow!("{error}"))
}

static OWN: OnceLock<Result<Own, String>> = OnceLock::new();

/// What the name of a group that a test process made for itself ends in.
const APP: &str = "-app";

/// The group of this process. Sockets belong to the group in which they were opened.
#[derive(Debug)]
struct Own {
    path: PathBuf,
    came_from: PathBuf,
}

impl Own {
    fn enter() -> Result<Self> {
        let root = root()?;
        remove_groups_of_the_dead(&root)?;
        let came_from = of("self")?;
        let path = root.join(format!("{PREFIX}{}{APP}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("create cgroup {}", path.display()))?;
        let own = Self { path, came_from };
        move_this_process(&own.path)?;
        // SAFETY: `leave` stays where it is for as long as the process lives, and does not unwind.
        let registered = unsafe { libc::atexit(leave) };
        ensure!(registered == 0, "register the way out of cgroup {}", own.path.display());
        Ok(own)
    }
}

extern "C" fn leave() {
    let Some(Ok(own)) = OWN.get() else { return };
    let left = move_this_process(&own.came_from)
        .and_then(|()| fs::remove_dir(&own.path).context("remove the cgroup"));
    if let Err(error) = left {
        // A closed standard error must not make this panic.
        let _ = writeln!(std::io::stderr(), "leave cgroup {}: {error:#}", own.path.display());
    }
}

fn move_this_process(group: &Path) -> Result<()> {
    fs::write(group.join("cgroup.procs"), std::process::id().to_string())
        .with_context(|| format!("move this process into cgroup {}", group.display()))
}

/// Test processes that were killed could not remove theirs.
fn remove_groups_of_the_dead(root: &Path) -> Result<()> {
    let groups = fs::read_dir(root).with_context(|| format!("list {}", root.display()))?;
    for group in groups.flatten() {
        let name = group.file_name();
        let pid = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(APP))
            .and_then(|pid| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // It may have been removed by another test process, or hold what a dead one left running.
            let _ = fs::remove_dir(group.path());
        }
    }
    Ok(())
}

/// The group that a process is in.
pub(crate) fn of(process: impl Display) -> Result<PathBuf> {
    let path = format!("/proc/{process}/cgroup");
    let groups = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    Ok(root()?.join(own.with_context(|| format!("find a cgroup v2 in {path}"))?))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_and_its_children_move_into_a_group_of_their_own() -> Result<()> {
        if !crate::pod::is_root() {
            crate::skip!("cgroups need root");
        }
        let own = of_this_process()?;
        let name = own.file_name().context("name the group")?.to_string_lossy();
        ensure!(fs::read_to_string("/proc/self/cgroup")?.contains(&*name));
        let child = Command::new("cat").arg("/proc/self/cgroup").output().context("run cat")?;
        ensure!(String::from_utf8_lossy(&child.stdout).contains(&*name));
        ensure!(of_this_process()? == own);
        Ok(())
    }
}

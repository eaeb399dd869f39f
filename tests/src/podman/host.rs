//! The node that podman finds: this machine, or, where its cgroups are of both versions or limits cannot be
//! raised, a view of this machine in which podman works. The Pods notice nothing of that.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::Process;
use crate::wait::until_true;

/// Between podman and crun: takes out what this machine cannot grant.
const RUNTIME: &str = include_str!("runtime.py");

const SETTINGS: &str =
    "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"crun\"\n";

/// How programs of the node are run.
#[derive(Debug)]
pub(super) struct Host {
    /// A process in a mount namespace of its own; none where the machine will do as it is.
    view: Option<Process>,
    settings: PathBuf,
}

impl Host {
    pub(super) fn here(directory: &Path) -> Result<Self> {
        let settings = directory.join("containers.conf");
        let mut text = SETTINGS.to_owned();
        let as_it_is = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let view = if as_it_is {
            None
        } else {
            let runtime = directory.join("crun");
            fs::write(&runtime, RUNTIME).context("write the runtime's wrapper")?;
            fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755))?;
            text += &format!("[engine.runtimes]\ncrun = [\"{}\"]\n", runtime.display());
            Some(Self::view(&directory.join("controllers"))?)
        };
        fs::write(&settings, text).context("write podman's settings")?;
        Ok(Self { view, settings })
    }

    /// A program of the node.
    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = match &self.view {
            None => Command::new(program),
            Some(view) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--mount=/proc/{}/ns/mnt", view.id())).args(["--", program]);
                command
            }
        };
        command.env("CONTAINERS_CONF", &self.settings);
        command
    }

    /// One hierarchy of cgroups, and a bpffs, as a node has them; the controllers of the other version are
    /// elsewhere, for the runtime's wrapper.
    fn view(controllers: &Path) -> Result<Process> {
        const SCRIPT: &str = "mount --make-rprivate / && \
             for it in memory cpu; do test ! -d /sys/fs/cgroup/$it || \
             { mkdir -p \"$0/$it\" && mount --bind /sys/fs/cgroup/$it \"$0/$it\" || exit; }; done && \
             umount -R /sys/fs/cgroup && \
             mount -t cgroup2 none /sys/fs/cgroup && mount -t bpf bpf /sys/fs/bpf && \
             echo ready && exec sleep infinity";
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--", "sh", "-c", SCRIPT]).arg(controllers);
        let mut view = Process::start(&mut unshare)?;
        until_true("a view of the node", || {
            view.still_runs()?;
            Ok(view.stdout().contains("ready"))
        })?;
        Ok(view)
    }
}

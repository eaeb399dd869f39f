//! Pods as a node runs them: real containers of real manifests, by podman, with a cable to a place for
//! their upstreams. Storage is the test's own, and everything is taken down with it.

pub mod account;
mod host;
pub mod manifest;
mod projected;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::cgroup;
use crate::place::Place;
use crate::pod::{INSIDE, UPSTREAM};
use crate::process::{self, Finished, Process};
use crate::server::{self, dnsmasq::Dnsmasq};
use account::Account;
use host::Host;
use manifest::{Hooks, Manifest, Node};
use projected::Files;

/// The variable that names the archive of the image, which `cargo xtask image` writes.
pub const IMAGE: &str = "AMBASSADOR_IMAGE";

/// For anything that podman does.
const STEP: Duration = Duration::from_secs(60);
/// What the containers of apps run: busybox, and what examples have their users add.
const APP: &str = "localhost/app:1";
/// A Job that has done its work once its database has answered.
const MIGRATION: &str = "#!/bin/sh\ntest \"$(printf question | nc 127.0.0.1 5432)\" = question\n";

/// A podman with images for the ambassador and for apps.
#[derive(Debug)]
pub struct Podman {
    directory: TempDir,
    host: Host,
    node: Node,
    /// Of the Pods that were made.
    cgroups: Mutex<Vec<PathBuf>>,
}

/// A Pod.
#[derive(Debug)]
pub struct Played<'p> {
    podman: &'p Podman,
    manifest: Manifest,
    /// Where its containers' sockets are.
    pub inside: Place,
    /// What they reach by their cable.
    pub upstream: Place,
}

/// A [`Podman`] of the test's own, or a skipped test: where there can be none.
#[macro_export]
macro_rules! podman {
    () => {{
        if let Err(why) = $crate::podman::means() {
            $crate::skip!("{why:#}");
        }
        $crate::podman::Podman::new()?
    }};
}

/// Whether there can be a podman.
pub fn means() -> Result<()> {
    ensure!(crate::pod::is_root(), "real containers need root");
    let programs =
        ["podman", "crun", "catatonit", "busybox", "ip", "nsenter", "bpftool", "python3"];
    if let Some(program) = server::missing(&programs) {
        anyhow::bail!("{program} is not installed");
    }
    let image = std::env::var_os(IMAGE);
    image.with_context(|| format!("{IMAGE} does not name what `cargo xtask image` has written"))?;
    Ok(())
}

impl Podman {
    /// With the image that the environment names.
    pub fn new() -> Result<Self> {
        let directory = tempfile::tempdir().context("create a directory for podman")?;
        let host = Host::here(directory.path())?;
        let resolv_conf = directory.path().join("resolv.conf");
        fs::write(&resolv_conf, Dnsmasq::resolv_conf(UPSTREAM.0)).context("write a resolv.conf")?;
        let volumes = directory.path().join("volumes");
        let node = Node { ambassador: String::new(), app: APP, resolv_conf, volumes };
        let mut podman = Self { directory, host, node, cgroups: Mutex::default() };
        let image = std::env::var_os(IMAGE).with_context(|| format!("find {IMAGE}"))?;
        let loaded = podman.run(&["load".as_ref(), "--input".as_ref(), Path::new(&image)])?;
        let name = loaded.lines().find_map(|line| line.strip_prefix("Loaded image: "));
        podman.node.ambassador =
            name.context("find the name of the loaded image")?.trim().to_owned();
        podman.import_app()?;
        Ok(podman)
    }

    /// Makes the Pod of a manifest, as far as this podman understands it: its network is there, and its
    /// containers are not started.
    pub fn make(&self, text: &str) -> Result<Played<'_>> {
        let manifest = Manifest::read(text, &self.node)?;
        let path = self.directory.path().join(format!("{}.yaml", manifest.name));
        fs::write(&path, manifest.for_podman()).context("write a manifest")?;
        for (_, place, files) in &manifest.projected {
            projected::show(place, files)?;
        }
        // Taken down also if it comes up by half.
        let half = Half(self, &manifest.name);
        let path = path.to_str().context("name the manifest")?;
        let profiles = self.seccomp_profiles();
        let profiles = profiles.to_str().context("name the profiles")?;
        let play = ["kube", "play", "--start=false", "--network", "none"];
        self.run(&[&play[..], &["--seccomp-profile-root", profiles, path]].concat())?;
        let infra =
            self.run(&["pod", "inspect", &manifest.name, "--format", "{{.InfraContainerID}}"])?;
        self.run(&["start", infra.trim()])?;
        let infra = self.pid(infra.trim())?;
        let pod = cgroup::of(infra)?.parent().context("find the Pod's cgroup")?.to_owned();
        self.cgroups.lock().unwrap_or_else(PoisonError::into_inner).push(pod);
        let inside = Place::of_process(infra, INSIDE)?;
        for (name, value) in &manifest.sysctls {
            let setting = format!("/proc/sys/{}", name.replace('.', "/"));
            inside.enter(|| fs::write(&setting, value).with_context(|| format!("set {name}")))?;
        }
        let upstream = crate::pod::upstream_of(&inside)?;
        std::mem::forget(half);
        Ok(Played { podman: self, manifest, inside, upstream })
    }

    /// Where the node has the profiles of seccomp that manifests name.
    pub fn seccomp_profiles(&self) -> PathBuf {
        self.directory.path().join("seccomp")
    }

    /// What a program says that runs on the node.
    pub fn on_node(&self, program: &str, arguments: &[&str]) -> Result<String> {
        process::run(self.host.command(program).args(arguments), STEP)
    }

    /// Runs podman to its end; its output, if it succeeds.
    fn run<A: AsRef<std::ffi::OsStr>>(&self, arguments: &[A]) -> Result<String> {
        process::run(self.command().args(arguments), STEP)
    }

    /// The process of a container that was started first.
    fn pid(&self, container: &str) -> Result<u32> {
        let format = ["inspect", "--type", "container", "--format", "{{.State.Pid}}", container];
        let pid = self.run(&format)?;
        pid.trim().parse().with_context(|| format!("read the pid of {container}"))
    }

    fn command(&self) -> Command {
        let mut podman = self.host.command("podman");
        for (flag, name) in [("--root", "root"), ("--runroot", "run")] {
            podman.arg(flag).arg(self.directory.path().join(name));
        }
        podman.args(["--storage-driver", "vfs"]);
        podman
    }

    fn import_app(&self) -> Result<()> {
        let root = self.directory.path().join("app");
        fs::create_dir_all(root.join("bin")).context("make the app's file system")?;
        let busybox = server::find("busybox").context("find busybox")?;
        fs::copy(busybox, root.join("bin/busybox")).context("copy busybox")?;
        for name in ["sh", "sleep", "nc", "test", "touch", "printf", "dd", "wc"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
        }
        let ambassador = crate::ambassador::binary()?;
        fs::copy(ambassador, root.join("ambassador")).context("copy the ambassador")?;
        fs::write(root.join("migrate"), MIGRATION).context("write what a Job runs")?;
        fs::set_permissions(root.join("migrate"), fs::Permissions::from_mode(0o755))?;
        let archive = self.directory.path().join("app.tar");
        process::run(
            Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&archive).arg("."),
            STEP,
        )?;
        let mut import = self.command();
        import.args(["import", "--quiet", "--change", "ENV PATH=/bin"]).arg(archive).arg(APP);
        process::run(&mut import, STEP)?;
        Ok(())
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // The images go with the directory.
        if let Err(error) = self.run(&["pod", "rm", "--all", "--force", "--time", "0"]) {
            eprintln!("take down what podman runs: {error:#}");
        }
        // What podman lost sight of, and directories that it leaves.
        let cgroups = self.cgroups.get_mut().unwrap_or_else(PoisonError::into_inner);
        for pod in cgroups.iter().filter(|pod| pod.exists()) {
            if let Err(error) = cgroup::remove(pod) {
                eprintln!("remove {}: {error:#}", pod.display());
            }
        }
    }
}

impl Played<'_> {
    /// Starts its containers, those that come first to their end.
    pub fn begin(&self) -> Result<()> {
        self.podman.run(&["pod", "start", &self.manifest.name])?;
        self.run_hooks(&self.manifest.after_start)
    }

    fn run_hooks(&self, hooks: &Hooks) -> Result<()> {
        for (container, command) in hooks {
            let words: Vec<_> = command.iter().map(String::as_str).collect();
            let ended = self.exec(container, &words)?;
            ended.success().with_context(|| format!("a hook of {container}"))?;
        }
        Ok(())
    }

    /// Waits for a container to end; its exit code.
    pub fn wait(&self, container: &str) -> Result<i32> {
        let code = self.podman.run(&["wait", &self.container(container)])?;
        code.trim().parse().with_context(|| format!("read the exit code of {container}"))
    }

    /// Runs a program in a container to its end.
    pub fn exec(&self, container: &str, command: &[&str]) -> Result<Finished> {
        self.start(container, command)?.finish(STEP)
    }

    /// Starts a program in a container.
    pub fn start(&self, container: &str, command: &[&str]) -> Result<Process> {
        let name = self.container(container);
        Process::start(self.podman.command().args(["exec", &name]).args(command))
    }

    /// What a container has logged.
    pub fn logs(&self, container: &str) -> Result<String> {
        // One that does not come up is started again and again.
        let logs = ["logs", "--tail", "30", &self.container(container)];
        let logs = Process::start(self.podman.command().args(logs))?;
        let Finished { stdout, stderr, .. } = logs.finish(STEP)?;
        Ok(stdout + &stderr)
    }

    /// The process of a container that was started first.
    pub fn pid(&self, container: &str) -> Result<u32> {
        self.podman.pid(&self.container(container))
    }

    /// What a container uses; none where no limit of memory is in force.
    pub fn account(&self, container: &str) -> Result<Option<Account>> {
        Account::of(self.pid(container)?)
    }

    /// A container's cgroup as this process sees it.
    pub fn cgroup(&self, container: &str) -> Result<PathBuf> {
        cgroup::of(self.pid(container)?)
    }

    /// Changes what a ConfigMap or a Secret shows in a volume, as the kubelet does.
    pub fn change(&self, volume: &str, files: &[(&str, &str)]) -> Result<()> {
        let mut volumes = self.manifest.projected.iter();
        let found = volumes.find(|(name, ..)| name == volume);
        let (_, place, _) = found.with_context(|| format!("find the volume {volume}"))?;
        let files: Files =
            files.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect();
        projected::show(place, &files)
    }

    /// Ends a container by a signal.
    pub fn kill(&self, container: &str, signal: &str) -> Result<()> {
        self.podman.run(&["kill", "--signal", signal, &self.container(container)]).map(drop)
    }

    /// Starts a container again, as the kubelet does with one that has ended.
    pub fn restart(&self, container: &str) -> Result<()> {
        self.podman.run(&["start", &self.container(container)]).map(drop)
    }

    /// Deletes the Pod as the kubelet does: hooks first, then SIGTERM, then SIGKILL.
    pub fn delete(self) -> Result<()> {
        self.run_hooks(&self.manifest.before_stop)?;
        let grace = self.manifest.grace.to_string();
        self.podman.run(&["pod", "stop", "--time", &grace, &self.manifest.name])?;
        self.podman.run(&["pod", "rm", "--force", &self.manifest.name]).map(drop)
    }

    fn container(&self, name: &str) -> String {
        format!("{}-{name}", self.manifest.name)
    }
}

/// A Pod that is coming up.
struct Half<'p>(&'p Podman, &'p str);

impl Drop for Half<'_> {
    fn drop(&mut self) {
        let Self(podman, name) = self;
        // It may not be there at all.
        let _ = podman.run(&["pod", "rm", "--force", "--time", "0", name]);
    }
}

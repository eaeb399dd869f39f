//! The product itself, as its users start it: the binary with routes, its probes, metrics, log and
//! control socket.

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::cgroup;
use crate::http::{self, Answer};
use crate::metrics::Metrics;
use crate::place::Place;
use crate::process::{self, Finished, Process};
use crate::wait::{SOON, until, until_true};

/// The variable naming a binary to test; without it the tests build their own.
pub const BINARY: &str = "AMBASSADOR_BIN";

/// An ambassador to be started.
#[derive(Debug)]
pub struct Launch {
    place: Place,
    binary: PathBuf,
    admin: SocketAddr,
    directory: TempDir,
    wrapper: Vec<OsString>,
    arguments: Vec<OsString>,
}

/// A running ambassador, killed when dropped.
#[derive(Debug)]
pub struct Ambassador {
    /// The process, with its log on standard error.
    pub process: Process,
    /// Where probes and metrics are.
    pub admin: SocketAddr,
    place: Place,
    directory: TempDir,
}

impl Launch {
    /// With no route yet, an admin port and a control socket of its own, and a log for machines.
    pub fn new(place: &Place) -> Result<Self> {
        let directory = tempfile::tempdir().context("create a directory for an ambassador")?;
        let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, place.port()?));
        let arguments = ["--log-format", "json", "--log-level", "info"].map(OsString::from).into();
        Ok(Self {
            place: place.clone(),
            binary: binary()?.into(),
            admin,
            directory,
            wrapper: Vec::new(),
            arguments,
        })
    }

    /// With one more route, `[NAME:]LISTEN=ENDPOINT[,ENDPOINT...]`.
    pub fn route(self, route: impl AsRef<OsStr>) -> Self {
        self.flag("--route", route)
    }

    /// With a flag and its value.
    pub fn flag(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.arguments.extend([name.into(), value.as_ref().into()]);
        self
    }

    /// Carried by this tier of the kernel or not at all, for apps in the cgroup of this process.
    pub fn in_kernel(self, tier: impl Display) -> Result<Self> {
        let tier = tier.to_string();
        Ok(self.flag("--require", &tier).flag("--tier", tier).cgroup(cgroup::of_this_process()?))
    }

    /// For apps in this cgroup.
    pub fn cgroup(self, path: &Path) -> Self {
        self.flag("--cgroup", path)
    }

    /// With this text as its configuration file.
    pub fn config(self, yaml: &str) -> Result<Self> {
        let path = configuration(&self.directory);
        std::fs::write(&path, yaml).context("write a configuration file")?;
        Ok(self.flag("--config", path))
    }

    /// Started by another program, such as `setpriv`, that replaces itself by what follows it.
    pub fn under(mut self, wrapper: &[&str]) -> Self {
        self.wrapper.splice(..0, wrapper.iter().map(OsString::from));
        self
    }

    /// Run by this user, with no capability left, as Pods run it. Needs root.
    pub fn by_user(mut self, uid: u32) -> Result<Self> {
        let directory = self.directory.path();
        // Not every user may look into the directory it was built in.
        let copy = directory.join("ambassador");
        std::fs::copy(binary()?, &copy).context("copy the binary")?;
        chown(directory, Some(uid), Some(uid)).context("give the directory to the user")?;
        let id = uid.to_string();
        self.binary = copy;
        Ok(self.under(&[
            "setpriv",
            "--reuid",
            &id,
            "--regid",
            &id,
            "--clear-groups",
            "--inh-caps=-all",
            "--bounding-set=-all",
            "--no-new-privs",
            "--",
        ]))
    }

    /// Where its probes and metrics will be.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Where files go that live as long as the ambassador.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Starts it and waits until it is ready.
    pub fn start(self) -> Result<Ambassador> {
        let mut ambassador = self.spawn()?;
        ambassador.wait_until_ready()?;
        Ok(ambassador)
    }

    /// Starts it without waiting for anything.
    pub fn spawn(self) -> Result<Ambassador> {
        let control = control(&self.directory);
        let mut words: Vec<&OsStr> = self.wrapper.iter().map(OsString::as_os_str).collect();
        words.push(self.binary.as_os_str());
        let process = Process::start(
            self.place
                .command(words[0])
                .args(&words[1..])
                .arg("run")
                .args(&self.arguments)
                .arg("--admin-http")
                .arg(self.admin.to_string())
                .arg("--control")
                .arg(unix(&control)),
        )?;
        Ok(Ambassador { process, admin: self.admin, place: self.place, directory: self.directory })
    }
}

impl Ambassador {
    /// Waits until it says that its routes are bound and its configuration is in force.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        until("the ambassador's readiness", SOON, || {
            self.process.still_runs()?;
            Ok(self.get("/readyz").is_ok_and(|answer| answer.status == 200).then_some(()))
        })
        .with_context(|| format!("its log was: {}", self.process.stderr()))
    }

    /// Asks its admin port.
    pub fn get(&self, path: &str) -> Result<Answer> {
        http::get(&self.place, self.admin, path)
    }

    /// Its metrics now.
    pub fn metrics(&self) -> Result<Metrics> {
        let answer = self.get("/metrics")?;
        ensure!(answer.status == 200, "GET /metrics answered {}", answer.status);
        Metrics::parse(&answer.body)
    }

    /// Its log so far, line by line.
    pub fn log(&self) -> Result<Vec<Value>> {
        let text = self.process.stderr();
        // The last line may still be on its way.
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        complete
            .lines()
            .map(|line| {
                serde_json::from_str(line).with_context(|| format!("parse the log line {line:?}"))
            })
            .collect()
    }

    /// The access records so far that say this of `key`.
    pub fn access_records(&self, key: &str, value: &str) -> Result<Vec<Value>> {
        let mut log = self.log()?;
        log.retain(|line| line["target"] == "access" && line[key] == value);
        Ok(log)
    }

    /// Its control socket.
    pub fn control(&self) -> PathBuf {
        control(&self.directory)
    }

    /// Runs one of the commands that talk over the control socket, such as `status --json`.
    pub fn command(&self, words: &[&str]) -> Result<Finished> {
        let mut command = command(&self.place)?;
        command.args(words).arg("--control").arg(unix(&self.control()));
        Process::start(&mut command)?.finish(SOON)
    }

    /// Where its configuration file is, if it was started with one.
    pub fn configuration(&self) -> PathBuf {
        configuration(&self.directory)
    }

    /// Gives it another configuration, and has it read that; returns how the command ended.
    pub fn reconfigure(&self, yaml: &str) -> Result<Finished> {
        std::fs::write(self.configuration(), yaml).context("write a configuration file")?;
        self.command(&["reload"])
    }

    /// What `status --json` says.
    pub fn status(&self) -> Result<Value> {
        let told = self.command(&["status", "--json"])?.success()?;
        serde_json::from_str(&told).context("parse the status")
    }

    /// What `connections --json` says of each.
    pub fn connections(&self) -> Result<Vec<Value>> {
        let told = self.command(&["connections", "--json"])?.success()?;
        told.lines().map(|line| serde_json::from_str(line).context("parse a connection")).collect()
    }

    /// What carries each of them.
    pub fn tiers(&self) -> Result<Vec<String>> {
        let all = self.connections()?;
        Ok(all.iter().map(|it| it["tier"].as_str().unwrap_or_default().to_owned()).collect())
    }

    /// Waits until its admin port answers `path` with this status.
    pub fn until_answers(&self, path: &str, status: u16) -> Result<()> {
        until_true(&format!("{path} to answer {status}"), || Ok(self.get(path)?.status == status))
    }

    /// Tells it to end as the kubelet does, and expects it to end well.
    pub fn end(self) -> Result<()> {
        self.process.signal(libc::SIGTERM)?;
        self.ends_with(0)
    }

    /// Expects it to end by itself with this code.
    pub fn ends_with(self, code: i32) -> Result<()> {
        let finished = self.process.finish(SOON)?;
        ensure!(
            finished.code() == Some(code),
            "the ambassador ended with {} and not {code}: {}",
            finished.status,
            finished.stderr
        );
        Ok(())
    }
}

/// The ambassador's command line in `place`, without any argument yet.
pub fn command(place: &Place) -> Result<Command> {
    Ok(place.command(binary()?))
}

/// Why a tier cannot be used on this machine, as `doctor` says; `None` when it can.
pub fn obstacle(tier: &str) -> Result<Option<String>> {
    static ASKED: OnceLock<Result<Value, String>> = OnceLock::new();
    let ask = || doctor(binary()?);
    let said = ASKED.get_or_init(|| ask().map_err(|error| format!("{error:#}")));
    let said = said.as_ref().map_err(|error| anyhow!("{error}"))?;
    obstacle_in(said, tier)
}

/// What a binary's doctor says of the group that this process is in.
pub fn doctor(binary: &Path) -> Result<Value> {
    let mut doctor = Command::new(binary);
    doctor.args(["doctor", "--json", "--cgroup"]).arg(cgroup::of_this_process()?);
    let said = process::run(&mut doctor, SOON)?;
    serde_json::from_str(&said).context("parse what doctor says")
}

/// Why a tier does not work, as doctor says; nothing if it does.
pub fn obstacle_in(said: &Value, tier: &str) -> Result<Option<String>> {
    let tiers = said["tiers"].as_array().context("find the tiers in what doctor says")?;
    let tier = tiers
        .iter()
        .find(|line| line["tier"] == tier)
        .with_context(|| format!("find {tier} in what doctor says"))?;
    // That it cannot be tried is a reason to skip; that it was tried and is wrong is none.
    let checks = said["checks"].as_array().into_iter().flatten();
    let failed = checks.filter(|check| check["tier"] == tier["tier"] && check["passed"] == false);
    let failed: Vec<_> = failed.map(Value::to_string).collect();
    ensure!(failed.is_empty(), "the self-test of {} failed: {}", tier["tier"], failed.join(", "));
    let why = || format!("{}: {}", tier["tier"], tier["reason"]).replace('"', "");
    Ok((tier["works"] != true).then(why))
}

/// The binary under test, built if the environment names none.
pub fn binary() -> Result<&'static Path> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| match std::env::var_os(BINARY) {
        Some(path) => Ok(path.into()),
        None => build().map_err(|error| format!("{error:#}")),
    });
    found.as_deref().map_err(|error| anyhow!("{error}"))
}

fn build() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = process::run(
        Command::new(cargo)
            .args(["build", "--package", "ambassador-user", "--bin", "ambassador"])
            .arg("--message-format=json")
            .current_dir(env!("CARGO_MANIFEST_DIR")),
        Duration::from_secs(600),
    )?;
    output
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "ambassador")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("find the binary in what cargo built")
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

fn configuration(directory: &TempDir) -> PathBuf {
    directory.path().join("ambassador.yaml")
}

fn control(directory: &TempDir) -> PathBuf {
    directory.path().join("control.sock")
}

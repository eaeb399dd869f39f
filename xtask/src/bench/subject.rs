//! The subjects: the ways through that are compared, each started the same way for each load.

pub(crate) mod peer;
pub(crate) mod reload;
pub(crate) mod standby;

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ambassador_tests::cgroup;
use ambassador_tests::family;
use ambassador_tests::http;
use ambassador_tests::place::Place;
use ambassador_tests::process::Process;
use ambassador_tests::wait::{SOON, until};
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tempfile::TempDir;

use super::catalogue::{Kind, Load};
use peer::Peer;
use reload::{Reload, Version};
use standby::Standby;

/// Tiers that act on the clients' sockets, which must be in the cgroup that they are attached to.
pub(crate) const KERNEL_TIERS: [&str; 2] = ["direct", "sockmap"];

/// How long to wait before asking again whether a proxy is ready: that long a start may seem too long.
const GLANCE: Duration = Duration::from_micros(200);

/// One way from a client to the upstream.
pub(crate) enum Subject {
    /// The client connects to the upstream itself: the limit of what is possible here.
    NoProxy,
    /// The ambassador, kept to one tier.
    Ambassador {
        /// The binary.
        binary: PathBuf,
        /// The tier.
        tier: String,
    },
    /// Another proxy.
    Peer {
        /// Which.
        peer: Peer,
        /// Its program.
        program: PathBuf,
    },
}

/// What a proxy is to carry.
#[derive(Clone)]
pub(crate) struct Order {
    /// Where it listens: a route each.
    pub(crate) listen: Vec<SocketAddr>,
    /// Where the last route moves to, if that is done while it runs.
    pub(crate) elsewhere: Option<SocketAddr>,
    /// Where all of its routes lead.
    pub(crate) upstream: SocketAddr,
    /// What they lead to when that fails.
    pub(crate) standby: Option<Standby>,
    /// How often it is to ask the upstream, for each route, whether it works.
    pub(crate) checked: Option<Duration>,
    /// Where it may listen for other purposes.
    pub(crate) admin: SocketAddr,
    /// For how many connections at once it must have room.
    pub(crate) connections: usize,
}

/// A subject that is running: where clients connect, and the process if there is one.
pub(crate) struct Way {
    /// What clients connect to.
    pub(crate) addresses: Vec<SocketAddr>,
    /// The proxy.
    pub(crate) proxy: Option<Process>,
    /// When it was started.
    pub(crate) started: Instant,
    /// How it is told that a route has moved, if that is to be done.
    pub(crate) reload: Option<Reload>,
    /// Where its configuration lies while it runs.
    _directory: TempDir,
}

impl Subject {
    /// The name in the tables and in the results file.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::NoProxy => "no proxy".into(),
            Self::Ambassador { tier, .. } => format!("ambassador {tier}"),
            Self::Peer { peer, .. } => peer.title().into(),
        }
    }

    /// Whether it can carry a load at all.
    pub(crate) fn carries(&self, load: Load) -> bool {
        let checks = matches!(load.kind, Kind::Failover { .. } | Kind::Checks);
        match self {
            Self::NoProxy => !checks,
            // On that way connections are made by `splice`, too.
            Self::Ambassador { tier, .. } => !checks || tier != "copy",
            Self::Peer { peer: Peer::Haproxy, .. } => true,
            Self::Peer { peer, .. } => !checks && peer.carries(load),
        }
    }

    /// Starts it on the caller's CPU and in its namespace, and waits until it is in full service.
    pub(crate) fn start(&self, order: Order) -> Result<Way> {
        let directory = tempfile::tempdir().context("create a directory for a proxy")?;
        let file = directory.path().join("configuration.yaml");
        let configuration = self.configuration(&order, directory.path())?;
        fs::write(&file, &configuration)
            .with_context(|| format!("write the configuration of {}", self.name()))?;
        let Some(mut command) = self.command(&order, &file)? else {
            let (addresses, started) = (vec![order.upstream], Instant::now());
            let way = Way { addresses, proxy: None, started, reload: None, _directory: directory };
            return Ok(way);
        };
        let started = Instant::now();
        let mut proxy = Process::start(&mut command)?;
        while !self.is_ready(&order) {
            proxy.still_runs()?;
            ensure!(started.elapsed() < SOON, "{} is ready: not within {SOON:?}", self.name());
            thread::sleep(GLANCE);
        }
        let reload = match order.moved() {
            None => None,
            Some(moved) => {
                let after = self.configuration(&moved, directory.path())?;
                let versions = [Version::of(&order, configuration), Version::of(&moved, after)];
                Some(Reload::new(proxy.id(), self.reload_signal(), file, versions))
            }
        };
        let (addresses, proxy) = (order.listen, Some(proxy));
        Ok(Way { addresses, proxy, started, reload, _directory: directory })
    }

    /// What makes it read its configuration again.
    fn reload_signal(&self) -> Signal {
        match self {
            Self::Peer { peer, .. } => peer.reload_signal(),
            Self::Ambassador { .. } | Self::NoProxy => Signal::HUP,
        }
    }

    /// What its file says; nothing where it has none.
    fn configuration(&self, order: &Order, home: &Path) -> Result<String> {
        match self {
            Self::Peer { peer, .. } => peer.configuration(order, home),
            Self::Ambassador { .. } if order.takes_a_file() => Ok(ambassador_file(order)),
            Self::Ambassador { .. } | Self::NoProxy => Ok(String::new()),
        }
    }

    /// The others serve what they accept. The ambassador does too, but what it accepts before the kernel
    /// tiers are in force would go another way, so it is held to what it says.
    fn is_ready(&self, order: &Order) -> bool {
        match self {
            Self::Ambassador { .. } => http::get(&Place::here(), order.admin, "/readyz")
                .is_ok_and(|answer| answer.status == 200),
            Self::NoProxy | Self::Peer { .. } => {
                order.listen.last().is_some_and(|last| TcpStream::connect(last).is_ok())
            }
        }
    }

    /// What starts it, unless there is nothing to start.
    fn command(&self, order: &Order, file: &Path) -> Result<Option<Command>> {
        match self {
            Self::NoProxy => Ok(None),
            Self::Ambassador { binary, tier } => {
                let mut command = Command::new(binary);
                command.arg("run");
                if order.takes_a_file() {
                    command.arg("--config").arg(file);
                } else {
                    for listen in &order.listen {
                        command.args(["--route", &format!("{listen}={}", order.upstream)]);
                    }
                }
                command.args(["--tier", tier, "--require", tier]);
                command.args(["--admin-http", &order.admin.to_string(), "--control", "off"]);
                command.args(["--log-level", "warn"]);
                if KERNEL_TIERS.contains(&tier.as_str()) {
                    command.arg("--cgroup").arg(cgroup::of_this_process()?);
                }
                Ok(Some(command))
            }
            Self::Peer { peer, program } => peer.command(program, order, file).map(Some),
        }
    }
}

impl Order {
    /// Whether the ambassador's flags cannot say it.
    fn takes_a_file(&self) -> bool {
        self.elsewhere.is_some() || self.standby.is_some() || self.checked.is_some()
    }

    /// The same with the last route elsewhere, if that is to be.
    fn moved(&self) -> Option<Self> {
        let mut moved = self.clone();
        *moved.listen.last_mut()? = self.elsewhere?;
        Some(moved)
    }
}

/// The ambassador's routes in a file: an upstream each, as the flags have it.
fn ambassador_file(order: &Order) -> String {
    let (mut routes, mut upstreams) = (String::new(), String::new());
    for (number, listen) in order.listen.iter().enumerate() {
        routes += &format!(
            "  - {{ name: route{number}, listen: [\"{listen}\"], upstream: upstream{number} }}\n"
        );
        let upstream = match order.standby {
            Some(standby) => standby::ambassador(order, standby),
            None => {
                let health = order.checked.map_or(String::new(), |interval| {
                    format!(", health: {{ check: tcp, interval: {interval:?} }}")
                });
                format!("endpoints: [\"{}\"]{health}", order.upstream)
            }
        };
        upstreams += &format!("  upstream{number}: {{ {upstream} }}\n");
    }
    format!("version: 1\nroutes:\n{routes}upstreams:\n{upstreams}")
}

impl Drop for Way {
    /// One that forks must see its children end before it is killed, or their CPU time is lost. Those that
    /// serve for it, because only so it can be given another configuration, end when they are told to.
    fn drop(&mut self) {
        let Some(proxy) = &self.proxy else { return };
        if self.reload.is_some()
            && let Err(error) = proxy.signal(libc::SIGTERM)
        {
            eprintln!("xtask: {error:#}");
        }
        let alone = until("the end of a proxy's children", SOON, || {
            Ok((family::of(proxy.id()).len() == 1).then_some(()))
        });
        if let Err(error) = alone {
            eprintln!("xtask: {error:#}");
        }
    }
}

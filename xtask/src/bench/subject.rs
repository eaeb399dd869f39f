//! The subjects: the ways through that are compared, each started the same way for each load.

pub(crate) mod peer;

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ambassador_tests::cgroup;
use ambassador_tests::http;
use ambassador_tests::place::Place;
use ambassador_tests::process::Process;
use ambassador_tests::wait::{SOON, until};
use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::catalogue::Load;
use super::family;
use peer::Peer;

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
pub(crate) struct Order {
    /// Where it listens: a route each.
    pub(crate) listen: Vec<SocketAddr>,
    /// Where all of its routes lead.
    pub(crate) upstream: SocketAddr,
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
        match self {
            Self::NoProxy | Self::Ambassador { .. } => true,
            Self::Peer { peer, .. } => peer.carries(load),
        }
    }

    /// Starts it on the caller's CPU and in its namespace, and waits until it is in full service.
    pub(crate) fn start(&self, order: Order) -> Result<Way> {
        let directory = tempfile::tempdir().context("create a directory for a proxy")?;
        let Some(mut command) = self.command(&order, directory.path())? else {
            let (addresses, started) = (vec![order.upstream], Instant::now());
            return Ok(Way { addresses, proxy: None, started, _directory: directory });
        };
        let started = Instant::now();
        let mut proxy = Process::start(&mut command)?;
        while !self.is_ready(&order) {
            proxy.still_runs()?;
            ensure!(started.elapsed() < SOON, "{} is ready: not within {SOON:?}", self.name());
            thread::sleep(GLANCE);
        }
        Ok(Way { addresses: order.listen, proxy: Some(proxy), started, _directory: directory })
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
    fn command(&self, order: &Order, home: &Path) -> Result<Option<Command>> {
        match self {
            Self::NoProxy => Ok(None),
            Self::Ambassador { binary, tier } => {
                let mut command = Command::new(binary);
                command.arg("run");
                for listen in &order.listen {
                    command.args(["--route", &format!("{listen}={}", order.upstream)]);
                }
                command.args(["--tier", tier, "--require", tier]);
                command.args(["--admin-http", &order.admin.to_string(), "--control", "off"]);
                command.args(["--log-level", "warn"]);
                if KERNEL_TIERS.contains(&tier.as_str()) {
                    command.arg("--cgroup").arg(cgroup::of_this_process()?);
                }
                Ok(Some(command))
            }
            Self::Peer { peer, program } => peer.command(program, order, home).map(Some),
        }
    }
}

impl Drop for Way {
    /// One that forks must see its children end before it is killed, or their CPU time is lost.
    fn drop(&mut self) {
        let Some(proxy) = &self.proxy else { return };
        let alone = until("the end of a proxy's children", SOON, || {
            Ok((family::of(proxy.id()).len() == 1).then_some(()))
        });
        if let Err(error) = alone {
            eprintln!("xtask: {error:#}");
        }
    }
}

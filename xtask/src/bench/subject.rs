//! The subjects: the ways through that are compared, each started the same way for each load.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ambassador_tests::cgroup;
use ambassador_tests::place::Place;
use ambassador_tests::process::Process;
use ambassador_tests::wait::{SOON, until};
use anyhow::{Context, Result};
use tempfile::TempDir;

/// Tiers that act on the clients' sockets, which must be in the cgroup that they are attached to.
pub(crate) const KERNEL_TIERS: [&str; 2] = ["direct", "sockmap"];

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
    /// HAProxy, which can move bulk by splice(2) as well.
    Haproxy {
        /// The program.
        program: PathBuf,
        /// When it does.
        splice: Splice,
    },
    /// nginx's stream module.
    Nginx(PathBuf),
}

/// When HAProxy moves bytes by splice(2).
pub(crate) enum Splice {
    /// When it takes a stream for a fast one.
    Auto,
    /// Whenever it can.
    Always,
}

/// A subject that is running: where clients connect, and the process if there is one.
pub(crate) struct Way {
    /// What clients connect to.
    pub(crate) address: SocketAddr,
    /// The proxy.
    pub(crate) proxy: Option<Process>,
    /// Where its configuration lies while it runs.
    _directory: TempDir,
}

impl Subject {
    /// The name in the tables and in the results file.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::NoProxy => "no proxy".into(),
            Self::Ambassador { tier, .. } => format!("ambassador {tier}"),
            Self::Haproxy { splice: Splice::Auto, .. } => "HAProxy".into(),
            Self::Haproxy { splice: Splice::Always, .. } => "HAProxy splice".into(),
            Self::Nginx(_) => "nginx stream".into(),
        }
    }

    /// Starts it in `place`, where the caller must be, and waits until it accepts connections.
    pub(crate) fn start(&self, place: &Place, upstream: SocketAddr) -> Result<Way> {
        let directory = tempfile::tempdir().context("create a directory for a proxy")?;
        if let Self::NoProxy = self {
            return Ok(Way { address: upstream, proxy: None, _directory: directory });
        }
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, place.port()?));
        let mut command = self.command(address, upstream, directory.path())?;
        let mut proxy = Process::start(&mut command)?;
        until(&format!("{} accepts connections", self.name()), SOON, || {
            proxy.still_runs()?;
            Ok(TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok())
        })?;
        Ok(Way { address, proxy: Some(proxy), _directory: directory })
    }

    fn command(&self, listen: SocketAddr, upstream: SocketAddr, home: &Path) -> Result<Command> {
        match self {
            Self::NoProxy => unreachable!("without a proxy there is nothing to start"),
            Self::Ambassador { binary, tier } => {
                let mut command = Command::new(binary);
                command.args(["run", "--route", &format!("{listen}={upstream}")]);
                command.args(["--tier", tier, "--require", tier]);
                command.args(["--admin-http", "off", "--control", "off", "--log-level", "warn"]);
                if KERNEL_TIERS.contains(&tier.as_str()) {
                    command.arg("--cgroup").arg(cgroup::of_this_process()?);
                }
                Ok(command)
            }
            Self::Haproxy { program, splice } => {
                let config = home.join("haproxy.cfg");
                fs::write(&config, haproxy_config(listen, upstream, splice))
                    .context("write HAProxy's configuration")?;
                let mut command = Command::new(program);
                command.args(["-db", "-q", "-f"]).arg(config);
                Ok(command)
            }
            Self::Nginx(program) => {
                let config = home.join("nginx.conf");
                fs::write(&config, nginx_config(listen, upstream, home))
                    .context("write nginx's configuration")?;
                let mut command = Command::new(program);
                command.args(["-e", "stderr", "-p"]).arg(home).arg("-c").arg(config);
                Ok(command)
            }
        }
    }
}

/// Threads as HAProxy chooses them; no logging; connections as many as the loads need, because it
/// wants descriptors for all of them when it starts.
fn haproxy_config(listen: SocketAddr, upstream: SocketAddr, splice: &Splice) -> String {
    let options = match splice {
        Splice::Auto => "option splice-auto",
        Splice::Always => "option splice-request\n    option splice-response",
    };
    format!(
        "global
    maxconn 1500
defaults
    mode tcp
    {options}
    timeout connect 5s
    timeout client 1h
    timeout server 1h
listen bench
    bind {listen}
    server upstream {upstream}
"
    )
}

/// One process, so that its time and memory can be read where they are spent; no access log.
fn nginx_config(listen: SocketAddr, upstream: SocketAddr, home: &Path) -> String {
    let home = home.display();
    format!(
        "daemon off;
master_process off;
pid {home}/pid;
error_log stderr crit;
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
events {{ worker_connections 4096; }}
stream {{
    server {{
        listen {listen};
        proxy_pass {upstream};
    }}
}}
"
    )
}

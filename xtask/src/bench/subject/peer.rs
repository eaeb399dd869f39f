//! The proxies that the ambassador is measured beside, each configured as its manual advises for speed.

use std::path::Path;
use std::process::Command;

use ambassador_tests::pod::is_root;
use anyhow::{Context, Result};
use clap::ValueEnum;
use rustix::process::Signal;

use super::{Order, standby};
use crate::bench::catalogue::{Load, Service};

/// A proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Peer {
    /// HAProxy with `splice-auto`: splice(2) for what it takes for a fast stream
    Haproxy,
    /// HAProxy, splicing whenever it can
    HaproxySplice,
    /// nginx's stream module
    Nginx,
    /// socat, which forks for each connection
    Socat,
    /// twemproxy, for Redis: it reads the requests, and puts all on one connection
    Twemproxy,
    /// PgBouncer, for PostgreSQL: a server's connection for each client's
    PgbouncerSession,
    /// PgBouncer, for PostgreSQL: a server's connection for as long as a transaction takes
    PgbouncerTransaction,
}

impl Peer {
    /// The name in the tables and in the results file.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Haproxy => "HAProxy",
            Self::HaproxySplice => "HAProxy splice",
            Self::Nginx => "nginx stream",
            Self::Socat => "socat",
            Self::Twemproxy => "twemproxy",
            Self::PgbouncerSession => "PgBouncer session",
            Self::PgbouncerTransaction => "PgBouncer transaction",
        }
    }

    /// What its program is called.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Haproxy | Self::HaproxySplice => "haproxy",
            Self::Nginx => "nginx",
            Self::Socat => "socat",
            Self::Twemproxy => "nutcracker",
            Self::PgbouncerSession | Self::PgbouncerTransaction => "pgbouncer",
        }
    }

    /// The flag that makes the program say its version.
    pub(crate) fn version_flag(self) -> &'static str {
        match self {
            Self::Haproxy | Self::HaproxySplice | Self::Nginx => "-v",
            Self::Socat | Self::Twemproxy | Self::PgbouncerSession | Self::PgbouncerTransaction => {
                "-V"
            }
        }
    }

    /// Whether it understands the load, and can be asked for so much.
    pub(crate) fn carries(self, load: Load) -> bool {
        match self {
            Self::Haproxy | Self::HaproxySplice | Self::Nginx => true,
            // A process for each route and each connection.
            Self::Socat => load.routes == 1 && load.connections() <= 1000,
            Self::Twemproxy => load.service() == Service::Redis,
            Self::PgbouncerSession | Self::PgbouncerTransaction => {
                load.service() == Service::Postgres
            }
        }
    }

    /// What makes it read its configuration again.
    pub(super) fn reload_signal(self) -> Signal {
        match self {
            Self::Haproxy | Self::HaproxySplice => Signal::USR2,
            _ => Signal::HUP,
        }
    }

    /// What its file says; nothing where it has none.
    pub(super) fn configuration(self, order: &Order, home: &Path) -> Result<String> {
        match self {
            Self::Haproxy | Self::HaproxySplice => Ok(self.haproxy(order, home)),
            Self::Nginx => Ok(nginx(order, home)),
            Self::Socat => Ok(String::new()),
            Self::Twemproxy => Ok(twemproxy(order)),
            Self::PgbouncerSession | Self::PgbouncerTransaction => self.pgbouncer(order),
        }
    }

    /// What starts it with that file, in the foreground and with no log but of errors.
    pub(super) fn command(self, program: &Path, order: &Order, file: &Path) -> Result<Command> {
        let home = file.parent().context("find the directory of a configuration")?;
        let mut command = Command::new(program);
        match self {
            Self::Haproxy | Self::HaproxySplice => {
                // Only a master can be told to start over.
                command.args(order.elsewhere.map(|_| "-W"));
                command.args(["-db", "-q", "-f"]).arg(file);
            }
            Self::Nginx => {
                command.args(["-e", "stderr", "-p"]).arg(home).arg("-c").arg(file);
            }
            Self::Socat => {
                let Order { listen, upstream, .. } = order;
                let listen = listen.first().context("find the route")?;
                command.arg(format!(
                    "TCP-LISTEN:{},bind={},fork,reuseaddr,nodelay,backlog=4096",
                    listen.port(),
                    listen.ip()
                ));
                command.arg(format!("TCP:{upstream},nodelay"));
            }
            Self::Twemproxy => {
                command.arg("-c").arg(file);
                // It insists on a port for its statistics, and on files for its log and its process id.
                command.args(["-a", &order.admin.ip().to_string()]);
                command.args(["-s", &order.admin.port().to_string()]);
                command.args(["-o", "/dev/stderr", "-v", "0"]).arg("-p").arg(home.join("pid"));
            }
            Self::PgbouncerSession | Self::PgbouncerTransaction => {
                command.arg("-q").arg(file);
            }
        }
        Ok(command)
    }

    /// Threads as HAProxy chooses them; connections as many as the load needs, because it wants
    /// descriptors for all of them when it starts. One that starts over takes what it listens on from the
    /// one before, so that nobody is refused in between.
    fn haproxy(self, order: &Order, home: &Path) -> String {
        let options = match self {
            Self::HaproxySplice => "option splice-request\n    option splice-response",
            _ => "option splice-auto",
        };
        let hand_over = match order.elsewhere {
            Some(_) => {
                format!(
                    "    stats socket {}/stats level admin expose-fd listeners\n",
                    home.display()
                )
            }
            None => String::new(),
        };
        let mut text = format!(
            "global
    maxconn {}
{hand_over}defaults
    mode tcp
    {options}
    timeout connect 5s
    timeout client 1h
    timeout server 1h
",
            order.connections + 500
        );
        for (number, listen) in order.listen.iter().enumerate() {
            let servers = match order.standby {
                Some(standby) => standby::haproxy(order, standby),
                None => {
                    let check = order.checked.map(|interval| format!(" check inter {interval:?}"));
                    let check = check.unwrap_or_default();
                    format!("    server upstream {}{check}\n", order.upstream)
                }
            };
            text += &format!("listen route{number}\n    bind {listen}\n{servers}");
        }
        text
    }

    /// In session mode a client's connection is for a server's; more than that never wait here.
    fn pgbouncer(self, order: &Order) -> Result<String> {
        let Order { listen, upstream, .. } = order;
        let listen = listen.first().context("find the route")?;
        let mode = if self == Self::PgbouncerSession { "session" } else { "transaction" };
        // It refuses to run as root, and changes to this user by itself.
        let user = if is_root() { "user = postgres\n" } else { "" };
        Ok(format!(
            "[databases]
* = host={} port={} user=postgres
[pgbouncer]
listen_addr = {}
listen_port = {}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = 20
max_client_conn = 100
ignore_startup_parameters = extra_float_digits
log_connections = 0
log_disconnections = 0
{user}",
            upstream.ip(),
            upstream.port(),
            listen.ip(),
            listen.port(),
        ))
    }
}

/// One process, so that its time and memory can be read where they are spent, and a master beside it where
/// that is to be replaced; no access log. What it listens on counts as connections too.
fn nginx(order: &Order, home: &Path) -> String {
    let Order { listen, upstream, connections, .. } = order;
    let servers: String = listen
        .iter()
        .map(|listen| format!("    server {{ listen {listen}; proxy_pass {upstream}; }}\n"))
        .collect();
    let processes = match order.elsewhere {
        // As the user it was started by, like the others.
        Some(_) if is_root() => "worker_processes 1;\nuser root root;",
        Some(_) => "worker_processes 1;",
        None => "master_process off;",
    };
    format!(
        "daemon off;
{processes}
pid {}/pid;
error_log stderr crit;
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
events {{ worker_connections {}; }}
stream {{
{servers}}}
",
        home.display(),
        2 * connections + listen.len() + 500,
    )
}

/// One server, so that there is nothing to choose.
fn twemproxy(order: &Order) -> String {
    let listen: Vec<String> = order
        .listen
        .iter()
        .enumerate()
        .map(|(number, listen)| {
            format!(
                "route{number}:
  listen: {listen}
  redis: true
  hash: fnv1a_64
  distribution: ketama
  preconnect: true
  servers:
   - {}:1
",
                order.upstream
            )
        })
        .collect();
    listen.concat()
}

//! The command line: what can be typed.

mod config;
mod probe;

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

pub use self::config::{ConfigArgs, Source};
pub use self::probe::Probe;
use crate::config::{Cgroup, ControlText, HttpText, Problem, Tier, TierLimit, Within};
use crate::datapath::pins::Owner;
use crate::manifest::Mode;
use crate::telemetry::{LogFilter, LogFormat};

/// Carries a Pod's localhost connections to the real service.
#[derive(Debug, Parser)]
#[command(
    name = "ambassador",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Examples:
  ambassador run --route 5432=orders-db.prod.svc:5432
  ambassador run --route 127.0.0.1:6380=redis-0:6379,redis-1:6379
  ambassador run --config /etc/ambassador/config.yaml
  ambassador check config.yaml

Exit codes: 0 done, 1 failed, 2 wrong usage, 77 required tier not available, 78 bad configuration."
)]
pub struct Cli {
    #[command(flatten)]
    pub log: LogArgs,
    #[command(subcommand)]
    pub command: Command,
}

/// How the ambassador logs, on stderr.
#[derive(Debug, Args)]
pub struct LogArgs {
    /// The form of the log.
    #[arg(long, global = true, value_enum, default_value = "text", env = "AMBASSADOR_LOG_FORMAT")]
    pub log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, off, or TARGET=LEVEL,... [default: RUST_LOG,
    /// else info]
    #[arg(long, global = true, value_name = "LEVEL", env = "AMBASSADOR_LOG_LEVEL")]
    pub log_level: Option<LogFilter>,
}

/// What the ambassador is asked to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Listen and forward, in the foreground, until SIGTERM
    #[command(after_help = "Examples:
  ambassador run --route 5432=orders-db.prod.svc:5432
  ambassador run --route unix:/var/run/db/postgres.sock=db:5432 --tier copy
  ambassador run --config config.yaml --drain-grace 5s")]
    Run(ConfigArgs),
    /// Check the configuration and print what it means; exit 78 if it is bad
    #[command(after_help = "Examples:
  ambassador check config.yaml
  ambassador check --route 5432=orders-db.prod.svc:5432")]
    Check {
        /// The file to check [default: that of --config]
        #[arg(conflicts_with = "config")]
        file: Option<PathBuf>,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Print the JSON Schema of the configuration file
    #[command(after_help = "Example, for completion and checks in an editor:
  ambassador schema > ambassador.schema.json
and as the first line of config.yaml:
  # yaml-language-server: $schema=ambassador.schema.json")]
    Schema,
    /// Print the ambassador beside an app, as a patch of its Deployment
    #[command(after_help = "Examples:
  ambassador manifest --deployment orders --route 5432=orders-db.prod.svc:5432 > sidecar.yaml
and then kubectl patch deployment orders --patch-file sidecar.yaml; or, in a kustomization.yaml,
patches: [{ path: sidecar.yaml, target: { kind: Deployment } }], of
  ambassador manifest --mode loader --config config.yaml > sidecar.yaml")]
    Manifest {
        /// What the ambassador is given
        #[arg(long, value_enum, default_value = "restricted")]
        mode: Mode,
        /// The Deployment to patch [default: a name that only kustomize takes]
        #[arg(long, value_name = "NAME")]
        deployment: Option<String>,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Print a script of completions for a shell
    #[command(after_help = "Example:
  ambassador completions bash > /etc/bash_completion.d/ambassador")]
    Completions {
        /// The shell that is to read it
        shell: Shell,
    },
    /// Print the version and what this build contains
    Version,
    /// Say of every tier whether it works here, why not, and what to change
    #[command(after_help = "Example, in a Job that checks a node:
  ambassador doctor --require splice")]
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Exit 77 unless this tier works: direct, sockmap, splice or copy
        #[arg(long, value_name = "TIER")]
        require: Option<Tier>,
        /// The pod's cgroup, or auto
        #[arg(long, value_name = "PATH", default_value = "auto", env = "AMBASSADOR_CGROUP")]
        cgroup: Cgroup,
    },
    /// Measure what each tier reaches on this node, every byte checked, and say what to make of it
    #[command(
        after_help = "Nothing but this command's own connections on the loopback is touched, an ambassador that
runs here least of all. Exit codes: 0 measured, 1 a load failed (a byte was lost or wrong, or nothing
moved for five seconds).

Examples:
  ambassador bench
  ambassador bench --route orders-db --config /etc/ambassador/config.yaml
  ambassador bench --route 5432=orders-db.prod.svc:5432 --time 30s"
    )]
    Bench(BenchArgs),
    /// Load the kernel half, attach it to the pod's cgroup and pin it, for an ambassador without
    /// privileges to take over (in an init container)
    #[command(after_help = "Example, with the bpffs and the cgroup tree of the host mounted:
  ambassador load --for 65532:65532 --once --route 5432=orders-db.prod.svc:5432")]
    Load {
        /// The user and group of the ambassador that will run
        #[arg(long = "for", value_name = "UID[:GID]", default_value = "65532:65532", value_parser = owner)]
        owner: Owner,
        /// Have that ambassador remove what is pinned at its clean end, as the last in its Pod; else it
        /// stays for the next one until `unload`
        #[arg(long)]
        once: bool,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// Detach and remove what `load` has pinned; connections that are open stay
    Unload {
        /// Instead, whatever on this node belongs to Pods that are gone
        #[arg(long, conflicts_with_all = ["instance"])]
        stale: bool,
        /// The instance [default: that of this network namespace]
        #[arg(long, value_name = "NAME", env = "AMBASSADOR_INSTANCE")]
        instance: Option<String>,
    },
    /// Show the tier in force, and for each higher one exactly why it is not used
    Explain {
        /// Its name [default: every route]
        route: Option<String>,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Keep new connections of a route to a tier; `all splice` switches the kernel tiers off
    #[command(after_help = "Examples:
  ambassador tier orders-db splice
  ambassador tier all splice
  ambassador tier all auto")]
    Tier {
        /// The name of a route, or all
        route: String,
        /// The highest tier allowed, within the configuration: auto, direct, sockmap, splice, copy
        tier: TierLimit,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Show routes, endpoints, connections and bytes of the running ambassador
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Print again every second, until interrupted
        #[arg(long)]
        watch: bool,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// List the connections that are open: peer, endpoint, tier, bytes, age
    Connections {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Wait until the ambassador is up; exit 0 then, 1 if it is not in time
    #[command(after_help = "Example, before an app that cannot retry:
  ambassador wait --ready --timeout 30s && exec /app")]
    Wait {
        /// Wait until it is ready, not only started: a drain is not ready, nor, where --ready-when says so, a
        /// route without a healthy endpoint
        #[arg(long)]
        ready: bool,
        /// How long to wait
        #[arg(long, default_value = "30s", value_parser = timeout)]
        timeout: Duration,
        #[command(flatten)]
        probes: ProbesArgs,
    },
    /// Wait for the ambassador, run CMD, drain the ambassador when it ends, exit with its code (Jobs)
    #[command(
        after_help = "Example, in the app's container (the control socket on a shared volume, \
the same user in both):
  ambassador exec --control unix:/run/ambassador/control.sock -- /app/migrate --all"
    )]
    Exec {
        #[command(flatten)]
        probes: ProbesArgs,
        #[command(flatten)]
        control: ControlArgs,
        /// How long to wait for the ambassador
        #[arg(long, default_value = "30s", value_parser = timeout)]
        timeout: Duration,
        /// The command to run
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// End the running ambassador as SIGTERM does: accept no more, let open connections finish
    Drain(ControlArgs),
    /// End the running ambassador at once; connections that are open are cut
    Shutdown(ControlArgs),
    /// Have the running ambassador read its configuration file again; exit 78 if that is bad, and what ran
    /// before runs on
    #[command(after_help = "It does so by itself when the file changes, and at SIGHUP.

Example:
  ambassador reload")]
    Reload(ControlArgs),
    /// Change what the running ambassador logs
    #[command(after_help = "Example:
  ambassador log-level debug")]
    LogLevel {
        /// error, warn, info, debug, trace, off, or TARGET=LEVEL,...
        level: LogFilter,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Probe a service, from an image that has no shell
    #[command(subcommand)]
    Probe(Probe),
}

/// What is measured, and for whom.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// The route that the recommendation is for: its name in the configuration, or a route as `run` takes
    /// it [default: any plain route]
    #[arg(long, value_name = "ROUTE")]
    pub route: Option<String>,
    /// The configuration file of the route [env: AMBASSADOR_CONFIG]
    #[arg(long, value_name = "FILE", requires = "route")]
    pub config: Option<PathBuf>,
    /// The pod's cgroup, or auto [default: what the configuration of the route says, else auto]
    #[arg(long, value_name = "PATH", env = "AMBASSADOR_CGROUP")]
    pub cgroup: Option<Cgroup>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// How long it may take, about, from 1s to 5m
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = bench_time)]
    pub time: Duration,
}

/// Where a running ambassador is probed.
#[derive(Debug, Args)]
pub struct ProbesArgs {
    /// Where the ambassador serves its probes
    #[arg(
        long,
        value_name = "IP:PORT",
        default_value = "127.0.0.1:9090",
        env = "AMBASSADOR_ADMIN_HTTP",
        value_parser = probe_address
    )]
    pub admin_http: SocketAddr,
}

/// How a running ambassador is reached.
#[derive(Debug, Args)]
pub struct ControlArgs {
    /// The control socket of the running ambassador
    #[arg(
        long,
        value_name = "unix:PATH",
        default_value = "unix:/run/ambassador/control.sock",
        env = "AMBASSADOR_CONTROL",
        value_parser = control_socket
    )]
    pub control: PathBuf,
}

/// UID[:GID]; the group is that of the number of the user, unless named.
fn owner(text: &str) -> Result<Owner, Problem> {
    let number = |text: &str| {
        text.parse().map_err(|_| {
            Problem::new(
                format!("{text:?} is not a user"),
                "write UID or UID:GID, such as 65532:65532",
            )
        })
    };
    let (uid, gid) = text.split_once(':').unwrap_or((text, text));
    Ok(Owner { uid: number(uid)?, gid: number(gid)? })
}

/// A time to wait for something, of at most an hour.
fn timeout(text: &str) -> Result<Duration, Problem> {
    text.parse().map(|Within(time): Within<1, 3_600_000>| time)
}

fn bench_time(text: &str) -> Result<Duration, Problem> {
    text.parse().map(|Within(time): Within<1000, 300_000>| time)
}

/// Where to ask for an ambassador that serves its probes on this address.
fn probe_address(text: &str) -> Result<SocketAddr, Problem> {
    let HttpText(address) = text.parse()?;
    let mut address = address.ok_or_else(|| {
        Problem::new("probes are off", "name the address that the ambassador serves them on")
    })?;
    match address.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    Ok(address)
}

fn control_socket(text: &str) -> Result<PathBuf, Problem> {
    let ControlText(path) = text.parse()?;
    path.ok_or_else(|| Problem::new("the control socket is off", "name it as unix:PATH"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_commands_are_declared_without_contradiction() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_example_of_the_help_can_be_typed() {
        let mut tried = 0;
        let root = Cli::command();
        let mut commands = vec![&root];
        while let Some(command) = commands.pop() {
            commands.extend(command.get_subcommands());
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            for line in help.lines().filter(|line| line.starts_with("  ambassador ")) {
                let words = line.split_whitespace();
                let words = words.take_while(|word| !matches!(*word, ">" | "&&"));
                let parsed = Cli::try_parse_from(words);
                assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
                tried += 1;
            }
        }
        assert!(tried >= 10, "only {tried} examples were found");
    }

    #[test]
    fn a_probe_of_any_address_goes_to_the_loopback() {
        assert_eq!(probe_address("0.0.0.0:9090").unwrap().to_string(), "127.0.0.1:9090");
        assert_eq!(probe_address("[::]:9090").unwrap().to_string(), "[::1]:9090");
        assert_eq!(probe_address("10.0.0.1:9090").unwrap().to_string(), "10.0.0.1:9090");
        assert!(probe_address("off").is_err());
    }
}

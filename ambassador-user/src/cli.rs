//! The command line: what can be typed, and how flags join the other sources of configuration.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::config::{
    Config, ConfigError, ControlText, Document, Draft, Environment, HttpText, Layer, Place,
    Problem, Resolved, Said, Settings, Target, Tier, Warning, Within, resolve,
};

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
    pub log_level: Option<String>,
}

/// The form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
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
        /// Wait until it is ready, not only started: a drain is not ready
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
    /// Change what the running ambassador logs
    #[command(after_help = "Example:
  ambassador log-level debug")]
    LogLevel {
        /// error, warn, info, debug, trace, off, or TARGET=LEVEL,...
        level: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Probe a service, from an image that has no shell
    #[command(subcommand)]
    Probe(Probe),
}

/// How a service is probed.
#[derive(Debug, Subcommand)]
pub enum Probe {
    /// Exit 0 if TARGET accepts a connection, 1 if not
    #[command(after_help = "Examples:
  ambassador probe tcp 127.0.0.1:5432
  ambassador probe tcp unix:/var/run/db/postgres.sock --timeout 500ms")]
    Tcp {
        /// HOST:PORT, [IP6]:PORT or unix:PATH
        target: Target,
        /// How long to try
        #[arg(long, default_value = "1s", value_parser = timeout)]
        timeout: Duration,
    },
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

/// The configuration as flags give it.
///
/// The values stay text until [`ConfigArgs::load`], so that a bad one is a configuration error like
/// in any other source. The variables are read there too, from the environment that is passed in.
#[derive(Debug, Clone, Default, Args)]
pub struct ConfigArgs {
    /// The configuration file, YAML or TOML (by extension) [env: AMBASSADOR_CONFIG]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// A route, [NAME:]LISTEN=ENDPOINT[,ENDPOINT...]; can be repeated [env: AMBASSADOR_ROUTE_0, _1...]
    ///
    /// LISTEN is PORT (127.0.0.1, and ::1 where there is one), IP:PORT, [IP6]:PORT or unix:PATH.
    /// ENDPOINT is HOST:PORT[:WEIGHT], [IP6]:PORT[:WEIGHT] or unix:PATH. Endpoints are tried in
    /// order; where one has a weight, connections are spread over all by weight. A route with the
    /// NAME of a route from a file or variable replaces it.
    #[arg(long = "route", value_name = "ROUTE")]
    pub routes: Vec<String>,
    /// The highest tier allowed: auto, direct, sockmap, splice, copy [env: AMBASSADOR_TIER] [default:
    /// auto]
    #[arg(long)]
    pub tier: Option<String>,
    /// Refuse to start below this tier: none, direct, sockmap, splice, copy [env: AMBASSADOR_REQUIRE]
    /// [default: none]
    #[arg(long, value_name = "TIER")]
    pub require: Option<String>,
    /// The address of probes and metrics, or off [env: AMBASSADOR_ADMIN_HTTP] [default: 0.0.0.0:9090]
    #[arg(long, value_name = "IP:PORT")]
    pub admin_http: Option<String>,
    /// The control socket, or off [env: AMBASSADOR_CONTROL] [default:
    /// unix:/run/ambassador/control.sock if possible]
    #[arg(long, value_name = "unix:PATH")]
    pub control: Option<String>,
    /// How long after SIGTERM new connections are accepted [env: AMBASSADOR_DRAIN_GRACE] [default: 0s]
    #[arg(long, value_name = "DURATION")]
    pub drain_grace: Option<String>,
    /// How long after SIGTERM what is left is cut [env: AMBASSADOR_DRAIN_DEADLINE] [default: 25s]
    #[arg(long, value_name = "DURATION")]
    pub drain_deadline: Option<String>,
}

impl ConfigArgs {
    /// The configuration that flags, environment, file and defaults amount to, in this order of
    /// precedence.
    pub fn load(&self, environment: &Environment) -> Result<(Config, Vec<Warning>), ConfigError> {
        let Resolved { config, warnings, .. } = self.resolve(environment)?;
        Ok((config, warnings))
    }

    /// The same, with who said what.
    pub fn resolve(&self, environment: &Environment) -> Result<Resolved, ConfigError> {
        let from_environment = environment.get("AMBASSADOR_CONFIG")?.map(PathBuf::from);
        let Some(file) = self.config.clone().or(from_environment) else {
            return resolve(vec![self.layer()?, environment.layer()?]);
        };
        let document = Document::read(&file)?;
        let layers = vec![self.layer()?, environment.layer()?, document.layer()?];
        resolve(layers).map_err(|error| document.locate(error))
    }

    /// What the flags say.
    fn layer(&self) -> Result<Layer, ConfigError> {
        fn said<T>(flag: &str, text: &Option<String>) -> Result<Option<Said<T>>, ConfigError>
        where
            T: FromStr<Err = Problem>,
        {
            text.as_ref().map(|text| Said::parse(text, Place::named(flag))).transpose()
        }
        let settings = Settings {
            admin_http: said("--admin-http", &self.admin_http)?,
            control: said("--control", &self.control)?,
            tier: said("--tier", &self.tier)?,
            require: said("--require", &self.require)?,
            drain_grace: said("--drain-grace", &self.drain_grace)?,
            drain_deadline: said("--drain-deadline", &self.drain_deadline)?,
        };
        let mut routes = Vec::with_capacity(self.routes.len());
        for text in &self.routes {
            let Said { value, place } = Said::parse(text, Place::named("--route"))?;
            routes.push(Draft::from_text(&value, place));
        }
        Ok(Layer { settings, routes, warnings: Vec::new() })
    }
}

/// A time to wait for something, of at most an hour.
fn timeout(text: &str) -> Result<Duration, Problem> {
    text.parse().map(|Within(time): Within<1, 3_600_000>| time)
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

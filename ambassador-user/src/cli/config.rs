//! The configuration as flags give it, and how flags join the other sources.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

use crate::config::{
    Config, ConfigError, Document, Draft, Environment, Layer, Place, Problem, Resolved, Said,
    Settings, Warning, resolve,
};

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
    /// ENDPOINT is HOST:PORT[:WEIGHT], [IP6]:PORT[:WEIGHT], srv:NAME[:WEIGHT] or unix:PATH. Endpoints are tried in
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
    /// The cgroup whose sockets the kernel tiers serve: an absolute path, or auto for the pod's [env:
    /// AMBASSADOR_CGROUP] [default: auto]
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<String>,
    /// The name that the kernel half is pinned under [env: AMBASSADOR_INSTANCE] [default: derived from
    /// the network namespace]
    #[arg(long, value_name = "NAME")]
    pub instance: Option<String>,
    /// How long after the ambassador was last seen alive the kernel goes on sending new connections by
    /// its tables; 0s is for ever [env: AMBASSADOR_STALE_AFTER] [default: 10m]
    #[arg(long, value_name = "DURATION")]
    pub stale_after: Option<String>,
    /// The bytes that one connection of the sockmap tier may have under way in the kernel [env:
    /// AMBASSADOR_INFLIGHT_BYTES] [default: 1048576]
    #[arg(long, value_name = "BYTES")]
    pub inflight_bytes: Option<String>,
    /// The messages that one connection of the sockmap tier may have under way in the kernel [env:
    /// AMBASSADOR_INFLIGHT_MESSAGES] [default: 2048]
    #[arg(long, value_name = "COUNT")]
    pub inflight_messages: Option<String>,
    /// The address of probes and metrics, or off [env: AMBASSADOR_ADMIN_HTTP] [default: 0.0.0.0:9090]
    #[arg(long, value_name = "IP:PORT")]
    pub admin_http: Option<String>,
    /// The control socket, or off [env: AMBASSADOR_CONTROL] [default:
    /// unix:/run/ambassador/control.sock if possible]
    #[arg(long, value_name = "unix:PATH")]
    pub control: Option<String>,
    /// What /readyz takes: bound (all routes are), or healthy (every route has a healthy endpoint, too)
    /// [env: AMBASSADOR_READY_WHEN] [default: bound]
    #[arg(long, value_name = "CHOICE")]
    pub ready_when: Option<String>,
    /// How long after SIGTERM new connections are accepted [env: AMBASSADOR_DRAIN_GRACE] [default: 0s]
    #[arg(long, value_name = "DURATION")]
    pub drain_grace: Option<String>,
    /// How long after SIGTERM what is left is cut [env: AMBASSADOR_DRAIN_DEADLINE] [default: 25s]
    #[arg(long, value_name = "DURATION")]
    pub drain_deadline: Option<String>,
}

/// Where a configuration comes from, to be read again: flags and variables stay as they were at the start.
#[derive(Debug, Clone)]
pub struct Source {
    flags: ConfigArgs,
    environment: Environment,
}

impl Source {
    /// These flags, and the variables of this process.
    pub fn new(flags: ConfigArgs) -> Self {
        Self { flags, environment: Environment::of_process() }
    }

    /// The file, if there is one.
    pub fn file(&self) -> Option<PathBuf> {
        self.flags.file(&self.environment).ok().flatten()
    }

    /// What it amounts to now.
    pub fn read(&self) -> Result<Resolved, ConfigError> {
        self.flags.resolve(&self.environment)
    }
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
        let Some(file) = self.file(environment)? else {
            return resolve(vec![self.layer()?, environment.layer()?]);
        };
        let document = Document::read(&file)?;
        let layers = vec![self.layer()?, environment.layer()?, document.layer(environment)?];
        let resolved = resolve(layers).map_err(|error| document.locate(error))?;
        Ok(Resolved { sha256: Some(document.sha256()), ..resolved })
    }

    /// The file, if one is named.
    fn file(&self, environment: &Environment) -> Result<Option<PathBuf>, ConfigError> {
        let from_environment = environment.get("AMBASSADOR_CONFIG")?.map(PathBuf::from);
        Ok(self.config.clone().or(from_environment))
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
            ready_when: said("--ready-when", &self.ready_when)?,
            tier: said("--tier", &self.tier)?,
            require: said("--require", &self.require)?,
            cgroup: said("--cgroup", &self.cgroup)?,
            instance: said("--instance", &self.instance)?,
            stale_after: said("--stale-after", &self.stale_after)?,
            inflight_bytes: said("--inflight-bytes", &self.inflight_bytes)?,
            inflight_messages: said("--inflight-messages", &self.inflight_messages)?,
            drain_grace: said("--drain-grace", &self.drain_grace)?,
            drain_deadline: said("--drain-deadline", &self.drain_deadline)?,
        };
        let mut routes = Vec::with_capacity(self.routes.len());
        for text in &self.routes {
            let Said { value, place } = Said::parse(text, Place::named("--route"))?;
            routes.push(Draft::from_text(&value, place));
        }
        Ok(Layer { settings, routes, ..Layer::default() })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::config::{Acceleration, Cgroup, Control, ReadyWhen, Tier, TierLimit};

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        config: ConfigArgs,
    }

    fn resolve<const F: usize, const V: usize>(
        flags: [&str; F],
        variables: [(&str, &str); V],
    ) -> Result<Resolved, String> {
        let flags = Flags::try_parse_from(["ambassador"].into_iter().chain(flags)).unwrap();
        let environment = variables.into_iter().collect();
        flags.config.resolve(&environment).map_err(|error| error.to_string())
    }

    #[test]
    fn a_flag_wins_over_a_variable_and_a_variable_over_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.yaml");
        let text = "{version: 1, acceleration: {tier: copy}, drain: {grace: 1s, deadline: 2s}}";
        std::fs::write(&path, text).unwrap();
        let resolved = resolve(
            ["--route", "1=a:1", "--tier", "splice"],
            [
                ("AMBASSADOR_CONFIG", path.to_str().unwrap()),
                ("AMBASSADOR_TIER", "direct"),
                ("AMBASSADOR_DRAIN_DEADLINE", "3s"),
            ],
        );
        let Resolved { config, origins, .. } = resolved.unwrap();
        assert_eq!(config.acceleration.tier, TierLimit::AtMost(Tier::Splice));
        assert_eq!(origins["acceleration.tier"], "--tier");
        assert_eq!(config.drain.deadline.as_secs(), 3);
        assert_eq!(origins["drain.deadline"], "AMBASSADOR_DRAIN_DEADLINE");
        assert_eq!(config.drain.grace.as_secs(), 1);
        assert_eq!(origins["drain.grace"], path.to_str().unwrap());
    }

    #[test]
    fn every_flag_of_a_setting_has_effect() {
        let flags = [
            "--route=db:1=a:1",
            "--tier=splice",
            "--require=copy",
            "--admin-http=off",
            "--control=unix:/run/a.sock",
            "--ready-when=healthy",
            "--drain-grace=1s",
            "--drain-deadline=2s",
            "--cgroup=/sys/fs/cgroup/pod",
            "--instance=orders-7f9c",
            "--stale-after=0s",
            "--inflight-bytes=65536",
            "--inflight-messages=16",
        ];
        let config = resolve(flags, []).unwrap().config;
        assert_eq!(config.admin.http, None);
        assert_eq!(config.admin.control, Control::At("/run/a.sock".into()));
        assert_eq!(config.admin.ready_when, ReadyWhen::Healthy);
        assert_eq!(config.acceleration.tier, TierLimit::AtMost(Tier::Splice));
        assert_eq!(config.acceleration.require, Some(Tier::Copy));
        assert_eq!((config.drain.grace.as_secs(), config.drain.deadline.as_secs()), (1, 2));
        assert_eq!(&*config.routes[0].name, "db");
        let Acceleration { cgroup, instance, stale_after, inflight, .. } = config.acceleration;
        assert_eq!(cgroup, Cgroup::At("/sys/fs/cgroup/pod".into()));
        assert_eq!((instance.as_deref(), stale_after), (Some("orders-7f9c"), None));
        assert_eq!((inflight.bytes.get(), inflight.messages.get()), (65_536, 16));
    }

    #[test]
    fn without_an_explicit_control_socket_the_default_is_only_tried() {
        let control =
            |flag: &str| resolve(["--route=1=a:1", flag], []).unwrap().config.admin.control;
        assert!(matches!(control("--tier=auto"), Control::IfPossible(_)));
        assert_eq!(control("--control=off"), Control::Off);
    }

    #[test]
    fn a_bad_flag_is_refused_by_its_name() {
        for (flags, expected) in [
            (["--route", "5432=db"], "--route: \"db\" has no port; add :PORT"),
            (["--tier", "fast"], "--tier: \"fast\" is not a tier; write auto, direct"),
            (
                ["--require", "splyce"],
                "--require: \"splyce\" is not a tier, did you mean \"splice\"?",
            ),
            (["--admin-http", "9090"], "--admin-http: 9090 does not say which address"),
            (["--control", "/run/a"], "--control: \"/run/a\" is not a Unix socket"),
            (["--ready-when", "helthy"], "--ready-when: \"helthy\" is not a choice, did you mean"),
            (["--drain-grace", "5"], "--drain-grace: \"5\" is not a duration"),
            (
                ["--drain-deadline", "2h"],
                "--drain-deadline: \"2h\" is out of bounds; write 0s to 1h",
            ),
            (["--cgroup", "pod"], "--cgroup: \"pod\" is not an absolute path; write the pod's"),
            (["--instance", ".a"], "--instance: \".a\" does not name an instance"),
            (["--stale-after", "1s"], "--stale-after: \"1s\" is too short; write 10s to 1day"),
            (["--inflight-bytes", "1MiB"], "--inflight-bytes: \"1MiB\" is not a whole number"),
            (["--inflight-messages", "8"], "--inflight-messages: \"8\" is out of bounds; write 16"),
            (["--config", "/nowhere/c.yaml"], "/nowhere/c.yaml: cannot be read: No such file"),
        ] {
            let error = resolve(flags, []).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}

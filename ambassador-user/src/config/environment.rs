//! What the environment says: routes, settings, and the variables of the images people replace.
//!
//! | variables | route |
//! |---|---|
//! | `AMBASSADOR_ROUTE_0`, `_1`... | as `--route`; gaps in the numbers are fine |
//! | `REDIS_SERVERS="HOST:PORT:WEIGHT ..."`, `LISTEN_PORT` (6380) | `redis`, spread by weight |
//! | `UPSTREAM_REDIS_HOSTS="HOST[:PORT],..."`, `LISTEN_PORT` (6379) | `redis`, in that order |
//! | `LISTEN_PORT` and/or `LISTEN_SOCKET`, `UPSTREAM_HOST=HOST[:PORT]`, `UPSTREAM_PORT` | one |
//!
//! `REDIS_SERVERS` spreads connections, not keys: unlike twemproxy the ambassador does not shard.
//! A variable that is empty counts as unset.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::net::Ipv6Addr;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::address::{EndpointText, ListenText, port, unix_path};
use super::layer::{Draft, Layer, Policy, Said, Service, Settings};
use super::name::Name;
use super::problem::{ConfigError, Place, Problem, Warning, nearest, quote};
use super::shorthand::RouteText;
use super::{Balance, Listen};

/// What our variables begin with, and how they go on.
const PREFIX: &str = "AMBASSADOR_";
const ROUTE: &str = "AMBASSADOR_ROUTE_";
const SUFFIXES: [&str; 16] = [
    "ADMIN_HTTP",
    "CGROUP",
    "CONFIG",
    "CONTROL",
    "DRAIN_DEADLINE",
    "DRAIN_GRACE",
    "INFLIGHT_BYTES",
    "INFLIGHT_MESSAGES",
    "INSTANCE",
    "LOG_FORMAT",
    "LOG_LEVEL",
    "READY_WHEN",
    "REQUIRE",
    "ROUTE_0",
    "STALE_AFTER",
    "TIER",
];

/// Where the replaced images listen unless LISTEN_PORT says otherwise.
const TWEMPROXY: NonZeroU16 = NonZeroU16::new(6380).unwrap();
const REDIS: NonZeroU16 = NonZeroU16::new(6379).unwrap();

/// The variables of a process.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    variables: BTreeMap<OsString, OsString>,
    is_elsewhere: bool,
}

impl Environment {
    /// The variables of this process.
    pub fn of_process() -> Self {
        std::env::vars_os().collect()
    }

    /// That of a process on another machine, of which nothing is known.
    pub(crate) fn elsewhere() -> Self {
        Self { is_elsewhere: true, ..Self::default() }
    }

    /// Whether neither variables nor files tell anything of it.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.is_elsewhere
    }

    /// The value of `name`; `None` if it is unset or empty.
    pub(crate) fn get(&self, name: &str) -> Result<Option<&str>, ConfigError> {
        let Some(value) = self.variables.get(OsStr::new(name)).filter(|value| !value.is_empty())
        else {
            return Ok(None);
        };
        value.to_str().map(Some).ok_or_else(|| {
            Problem::new("is not UTF-8 text", "write it as UTF-8").at(&Place::named(name))
        })
    }

    /// The value of `name`, parsed, with its place.
    pub(crate) fn said<T: FromStr<Err = Problem>>(
        &self,
        name: &str,
    ) -> Result<Option<Said<T>>, ConfigError> {
        self.get(name)?.map(|text| Said::parse(text, Place::named(name))).transpose()
    }

    /// Everything the environment says.
    pub(crate) fn layer(&self) -> Result<Layer, ConfigError> {
        let mut layer = Layer {
            settings: Settings {
                admin_http: self.said("AMBASSADOR_ADMIN_HTTP")?,
                control: self.said("AMBASSADOR_CONTROL")?,
                ready_when: self.said("AMBASSADOR_READY_WHEN")?,
                tier: self.said("AMBASSADOR_TIER")?,
                require: self.said("AMBASSADOR_REQUIRE")?,
                cgroup: self.said("AMBASSADOR_CGROUP")?,
                instance: self.said("AMBASSADOR_INSTANCE")?,
                stale_after: self.said("AMBASSADOR_STALE_AFTER")?,
                inflight_bytes: self.said("AMBASSADOR_INFLIGHT_BYTES")?,
                inflight_messages: self.said("AMBASSADOR_INFLIGHT_MESSAGES")?,
                drain_grace: self.said("AMBASSADOR_DRAIN_GRACE")?,
                drain_deadline: self.said("AMBASSADOR_DRAIN_DEADLINE")?,
            },
            routes: self.numbered_routes()?,
            warnings: self.likely_slips().collect(),
            ..Layer::default()
        };
        layer.routes.extend(self.redis_servers()?);
        layer.routes.extend(self.upstream_redis_hosts()?);
        layer.routes.extend(self.upstream_host()?);
        if layer.routes.is_empty()
            && let Some(unused) = self.listen_port()?
        {
            let fix = "set UPSTREAM_HOST beside it, or unset it";
            layer.warnings.push(Warning::new(unused.place, Problem::new("leads nowhere", fix)));
        }
        Ok(layer)
    }

    fn numbered_routes(&self) -> Result<Vec<Draft>, ConfigError> {
        let mut numbers: Vec<(u64, &str)> = self
            .names()
            // Others under this prefix may come from a Service that is called ambassador-route.
            .filter_map(|name| Some((name.strip_prefix(ROUTE)?.parse().ok()?, name)))
            .collect();
        numbers.sort_unstable();
        let mut routes = Vec::new();
        for (_, name) in numbers {
            if let Some(Said { value, place }) = self.said::<RouteText>(name)? {
                routes.push(Draft::from_text(&value, place));
            }
        }
        Ok(routes)
    }

    /// twemproxy's list: every server takes its share.
    fn redis_servers(&self) -> Result<Option<Draft>, ConfigError> {
        let Some(text) = self.get("REDIS_SERVERS")? else { return Ok(None) };
        let place = Place::named("REDIS_SERVERS");
        let endpoints = list(text, &place, str::parse)?;
        let listen = self.listen_port()?.unwrap_or(Said { value: TWEMPROXY, place: place.clone() });
        Ok(Some(draft("redis".parse().ok(), ports(&listen), endpoints, Balance::RoundRobin, place)))
    }

    /// Hosts in order of preference.
    fn upstream_redis_hosts(&self) -> Result<Option<Draft>, ConfigError> {
        let Some(text) = self.get("UPSTREAM_REDIS_HOSTS")? else { return Ok(None) };
        let place = Place::named("UPSTREAM_REDIS_HOSTS");
        let endpoints = list(text, &place, |host| endpoint(host, Some(REDIS)))?;
        let listen = self.listen_port()?.unwrap_or(Said { value: REDIS, place: place.clone() });
        Ok(Some(draft("redis".parse().ok(), ports(&listen), endpoints, Balance::Failover, place)))
    }

    /// One host behind a port, a socket or both.
    fn upstream_host(&self) -> Result<Option<Draft>, ConfigError> {
        let socket = self.said::<SocketPath>("LISTEN_SOCKET")?;
        let Some(host) = self.get("UPSTREAM_HOST")? else {
            let Some(socket) = socket else { return Ok(None) };
            let fix = "set UPSTREAM_HOST=HOST:PORT beside it, or unset it";
            return Err(Problem::new("leads nowhere", fix).at(&socket.place));
        };
        let place = Place::named("UPSTREAM_HOST");
        let listen_port = self.listen_port()?;
        let upstream_port = self
            .said::<PortText>("UPSTREAM_PORT")?
            .map(|said| said.value.0)
            .or(listen_port.as_ref().map(|said| said.value))
            .or(socket.as_ref().and_then(|said| well_known_port(&said.value.0)));
        let endpoint = endpoint(host, upstream_port).map_err(|problem| problem.at(&place))?;
        let mut listen = listen_port.map_or_else(Vec::new, |port| ports(&port));
        if let Some(Said { value: SocketPath(path), place }) = socket {
            listen.push(Said { value: Listen::Unix(path), place });
        }
        if listen.is_empty() {
            let fix = "set LISTEN_PORT or LISTEN_SOCKET beside it";
            return Err(Problem::new("does not say where to listen", fix).at(&place));
        }
        Ok(Some(draft(None, listen, vec![endpoint], Balance::Failover, place)))
    }

    fn listen_port(&self) -> Result<Option<Said<NonZeroU16>>, ConfigError> {
        let said = self.said::<PortText>("LISTEN_PORT")?;
        Ok(said.map(|Said { value: PortText(value), place }| Said { value, place }))
    }

    /// Variables that look like ours and are not. Not refused: Kubernetes sets AMBASSADOR_PORT and
    /// the like when a Service is called ambassador.
    fn likely_slips(&self) -> impl Iterator<Item = Warning> {
        self.names().filter_map(|name| {
            let suffix = name.strip_prefix(PREFIX)?;
            let numbered = name.strip_prefix(ROUTE).is_some_and(|n| n.parse::<u64>().is_ok());
            let near = nearest(suffix, SUFFIXES)?;
            (near != suffix && !numbered).then(|| {
                let problem = Problem::new("has no effect", format!("write {PREFIX}{near}"));
                Warning::new(Place::named(name), problem)
            })
        })
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.variables.keys().filter_map(|name| name.to_str())
    }
}

impl<K: Into<OsString>, V: Into<OsString>> FromIterator<(K, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(variables: I) -> Self {
        let pair = |(name, value): (K, V)| (name.into(), value.into());
        Self { variables: variables.into_iter().map(pair).collect(), is_elsewhere: false }
    }
}

struct PortText(NonZeroU16);

impl FromStr for PortText {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        port(text).map(Self)
    }
}

/// A socket's path, with or without `unix:`.
struct SocketPath(PathBuf);

impl FromStr for SocketPath {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        unix_path(text.strip_prefix("unix:").unwrap_or(text)).map(Self)
    }
}

fn ports(port: &Said<NonZeroU16>) -> Vec<Said<Listen>> {
    Said::listen(&ListenText::Port(port.value), &port.place)
}

fn draft(
    name: Option<Name>,
    listen: Vec<Said<Listen>>,
    endpoints: Vec<EndpointText>,
    balance: Balance,
    place: Place,
) -> Draft {
    let endpoints = endpoints.iter().map(EndpointText::meaning).collect();
    let service = Service::Own { endpoints, balance };
    Draft { place, name, listen, service, policy: Policy::default() }
}

/// The elements of a list with spaces or commas between them.
fn list(
    text: &str,
    place: &Place,
    parse: impl Fn(&str) -> Result<EndpointText, Problem>,
) -> Result<Vec<EndpointText>, ConfigError> {
    let parts = text.split([' ', '\t', '\n', ',']).filter(|part| !part.is_empty());
    let endpoints = parts.map(parse).collect::<Result<Vec<_>, _>>();
    match endpoints {
        Ok(endpoints) if endpoints.is_empty() => {
            Err(Problem::new("names no host", "write HOST:PORT, or unset it").at(place))
        }
        Ok(endpoints) => Ok(endpoints),
        Err(problem) => Err(problem.at(place)),
    }
}

/// HOST, which takes `default_port`, or HOST:PORT.
fn endpoint(text: &str, default_port: Option<NonZeroU16>) -> Result<EndpointText, Problem> {
    let bare_ip6 = text.parse::<Ipv6Addr>().is_ok();
    let has_port = !bare_ip6 && !text.ends_with(']') && text.contains(':');
    if has_port {
        return text.parse();
    }
    let Some(port) = default_port else {
        return Err(Problem::new(
            format!("{} has no port", quote(text)),
            "write HOST:PORT, or set UPSTREAM_PORT",
        ));
    };
    if bare_ip6 { format!("[{text}]:{port}").parse() } else { format!("{text}:{port}").parse() }
}

/// The port of the service that is known by this name of a socket, such as `.s.PGSQL.5432`.
fn well_known_port(socket: &Path) -> Option<NonZeroU16> {
    let name = socket.file_name()?.to_str()?.to_ascii_lowercase();
    let numbered = name.strip_prefix(".s.pgsql.").and_then(|number| port(number).ok());
    let services =
        [("pgsql", 5432), ("postgres", 5432), ("mysql", 3306), ("redis", 6379), ("mongodb", 27017)];
    let known = services.iter().find(|(service, _)| name.contains(service));
    numbered.or(known.and_then(|(_, port)| NonZeroU16::new(*port)))
}

#[cfg(test)]
mod tests;

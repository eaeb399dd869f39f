//! The configuration file as people type it, in YAML or TOML.
//!
//! The doc comments here are the descriptions of the JSON Schema that `ambassador schema` prints.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{Deserializer, Error, Visitor};

use super::acceleration::{InFlightBytes, InFlightMessages, InstanceText, StaleAfterText};
use super::address::ListenText;
use super::environment::Environment;
use super::layer::{Draft, DrainTime, Layer, Policy, Said, Service, Settings};
use super::name::Name;
use super::problem::{ConfigError, Place, Problem, Warning, nearest, quote};
use super::profile::{self, EnvironmentText};
use super::text::{OneOrMany, Text};
use super::upstream::UpstreamEntry;
use super::value::{ControlText, Count, HttpText, Protocol, RequireText, SocketMode, Within};
use super::{Cgroup, Clients, Limits, ReadyWhen, TierLimit};

const MAX_ROUTES: usize = 10_000;
const MAX_LISTEN: usize = 100;

/// What an ambassador listens on, where that leads, and how it behaves.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping with the keys version, routes and upstreams")]
#[schemars(title = "Configuration of the ambassador")]
pub(crate) struct FileText {
    /// The version of this format.
    version: Version,
    /// Which profile is in force, and by what evidence. Needed where upstreams have profiles.
    environment: Option<EnvironmentText>,
    #[serde(default)]
    admin: AdminText,
    #[serde(default)]
    acceleration: AccelerationText,
    #[serde(default)]
    drain: DrainText,
    /// Each accepts connections at its listen addresses and carries them to its upstream.
    #[serde(default)]
    routes: Vec<RouteEntry>,
    /// The services that routes lead to, by name.
    #[serde(default)]
    upstreams: BTreeMap<Text<Name>, UpstreamEntry>,
}

/// Where people and probes reach the ambassador.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, expecting = "a mapping with keys such as http and control")]
#[schemars(rename = "admin")]
struct AdminText {
    /// The address of probes and metrics (read-only), or off.
    #[schemars(extend("default" = "0.0.0.0:9090"))]
    http: Option<Text<HttpText>>,
    /// The socket for everything that changes state, or off. The default is
    /// unix:/run/ambassador/control.sock where that can be bound, else off.
    control: Option<Text<ControlText>>,
    /// What /readyz takes: bound (all routes are), or healthy (every route has a healthy endpoint, too).
    #[schemars(extend("default" = "bound"))]
    ready_when: Option<Text<ReadyWhen>>,
}

/// Which tiers may carry bytes: direct, sockmap, splice, copy, from the highest to the lowest.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, expecting = "a mapping with keys such as tier and require")]
#[schemars(rename = "acceleration")]
struct AccelerationText {
    /// The highest tier allowed; auto is the best that works here.
    #[schemars(extend("default" = "auto"))]
    tier: Option<Text<TierLimit>>,
    /// Refuse to start below this tier.
    #[schemars(extend("default" = "none"))]
    require: Option<Text<RequireText>>,
    /// The cgroup whose sockets the kernel tiers serve; auto finds the pod's.
    #[schemars(extend("default" = "auto"))]
    cgroup: Option<Text<Cgroup>>,
    /// The name that the kernel half is pinned under. The default is derived from the network
    /// namespace, so that two Pods of one node do not meet.
    instance: Option<Text<InstanceText>>,
    /// How long after the ambassador was last seen alive the kernel goes on sending new connections by
    /// its tables; 0s is for ever.
    #[schemars(extend("default" = "10m"))]
    stale_after: Option<Text<StaleAfterText>>,
    /// The bytes that one connection of the sockmap tier may have under way in the kernel.
    #[schemars(extend("default" = 1_048_576))]
    inflight_bytes: Option<Text<InFlightBytes>>,
    /// The messages that one connection of the sockmap tier may have under way in the kernel.
    #[schemars(extend("default" = 2_048))]
    inflight_messages: Option<Text<InFlightMessages>>,
}

/// What happens after SIGTERM. Both times count from the signal.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, expecting = "a mapping with the keys grace and deadline")]
#[schemars(rename = "drain")]
struct DrainText {
    /// How long new connections are still accepted.
    #[schemars(extend("default" = "0s"))]
    grace: Option<Text<DrainTime>>,
    /// When the connections that are left are cut.
    #[schemars(extend("default" = "25s"))]
    deadline: Option<Text<DrainTime>>,
}

/// One set of listen addresses that leads to one upstream.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping with the keys listen and upstream")]
#[schemars(rename = "route")]
struct RouteEntry {
    /// The name in logs and metrics; the default is the upstream's.
    name: Option<Text<Name>>,
    /// Where connections are accepted.
    listen: OneOrMany<Text<ListenText>>,
    /// The name of one of the upstreams.
    upstream: Text<Name>,
    /// What the bytes are: declared, never sniffed.
    #[schemars(extend("default" = "tcp"))]
    protocol: Option<Text<Protocol>>,
    /// Connections beyond this many are refused.
    #[schemars(extend("default" = 10_000))]
    max_connections: Option<Text<Count<1, 1_000_000>>>,
    /// Connections beyond this many that are on their way to the upstream are refused.
    max_pending: Option<Text<Count<1, 1_000_000>>>,
    #[serde(default)]
    per_endpoint: LimitsText,
    /// A connection that moves no byte for so long is closed; 0s is never.
    #[schemars(extend("default" = "0s"))]
    idle_timeout: Option<Text<Within<0, 86_400_000>>>,
    /// The highest tier allowed for this route, within acceleration.tier.
    #[schemars(extend("default" = "auto"))]
    tier: Option<Text<TierLimit>>,
    /// What its clients are like: nonblocking vouches that they use non-blocking sockets, as event loops do,
    /// and do not mind what those notice of the kernel tiers; one that is blocking all the same is left alone.
    #[schemars(extend("default" = "any"))]
    clients: Option<Text<Clients>>,
    /// The file mode of this route's Unix sockets; the directory decides who reaches them.
    #[schemars(extend("default" = "0666"))]
    socket_mode: Option<Text<SocketMode>>,
}

/// What one address of the upstream gets of the route at a time. With more, failover and source_hash refuse;
/// the others take another address.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a mapping with the keys max_connections and max_pending"
)]
#[schemars(rename = "per_endpoint")]
struct LimitsText {
    /// Most connections.
    max_connections: Option<Text<Count<1, 1_000_000>>>,
    /// Most connections that are on their way.
    max_pending: Option<Text<Count<1, 1_000_000>>>,
}

/// The JSON Schema of the file, draft 2020-12.
pub(crate) fn schema() -> Schema {
    schemars::schema_for!(FileText)
}

/// The only version there is.
#[derive(Debug)]
struct Version;

impl FileText {
    /// What the file says where the environment is this, with its names of upstreams resolved.
    pub(crate) fn layer(
        self,
        file: &Arc<Path>,
        environment: &Environment,
    ) -> Result<Layer, ConfigError> {
        let Version = self.version;
        let top = |key: &str| Place::in_file(file, key);
        let mut layer = Layer {
            settings: self.settings(file),
            routes_at: Some(Place::in_file(file, "routes")),
            ..Layer::default()
        };

        let mut entries = Vec::with_capacity(self.upstreams.len());
        for (Text(name), mut entry) in self.upstreams {
            let place = top("upstreams").key(&name);
            let reached = entry.reached(place)?;
            entries.push((name, entry, reached));
        }
        let said = Said { value: self.environment, place: top("environment") };
        let reached = || entries.iter().map(|(_, _, reached)| reached);
        layer.profile = profile::in_force(said, reached, environment, &mut layer.warnings)?;
        let mut upstreams = BTreeMap::new();
        for (name, entry, reached) in entries {
            let place = reached.upstream().clone();
            let endpoints = reached.endpoints(layer.profile.as_ref())?;
            let upstream = entry.meaning(&name, endpoints, &place, &mut layer.warnings)?;
            upstreams.insert(name, (Arc::new(upstream), place));
        }

        within(self.routes.len(), 0, MAX_ROUTES, &top("routes"))?;
        let mut unused = upstreams.clone();
        for (index, entry) in self.routes.into_iter().enumerate() {
            let place = top("routes").index(index);
            let name = &entry.upstream.0;
            let Some((upstream, _)) = upstreams.get(name) else {
                return Err(unknown_upstream(name, upstreams.keys()).at(&place.key("upstream")));
            };
            unused.remove(name);
            layer.routes.push(entry.draft(Service::Shared(upstream.clone()), place)?);
        }
        layer.warnings.extend(unused.into_values().map(|(_, place)| {
            Warning::new(place, Problem::new("no route leads here", "add a route, or remove it"))
        }));
        Ok(layer)
    }

    fn settings(&self, file: &Arc<Path>) -> Settings {
        fn said<T: Clone>(value: &Option<Text<T>>, file: &Arc<Path>, key: &str) -> Option<Said<T>> {
            let Text(value) = value.clone()?;
            Some(Said { value, place: Place::in_file(file, key) })
        }
        Settings {
            admin_http: said(&self.admin.http, file, "admin.http"),
            control: said(&self.admin.control, file, "admin.control"),
            ready_when: said(&self.admin.ready_when, file, "admin.ready_when"),
            tier: said(&self.acceleration.tier, file, "acceleration.tier"),
            require: said(&self.acceleration.require, file, "acceleration.require"),
            cgroup: said(&self.acceleration.cgroup, file, "acceleration.cgroup"),
            instance: said(&self.acceleration.instance, file, "acceleration.instance"),
            stale_after: said(&self.acceleration.stale_after, file, "acceleration.stale_after"),
            inflight_bytes: said(
                &self.acceleration.inflight_bytes,
                file,
                "acceleration.inflight_bytes",
            ),
            inflight_messages: said(
                &self.acceleration.inflight_messages,
                file,
                "acceleration.inflight_messages",
            ),
            drain_grace: said(&self.drain.grace, file, "drain.grace"),
            drain_deadline: said(&self.drain.deadline, file, "drain.deadline"),
        }
    }
}

impl RouteEntry {
    fn draft(self, service: Service, place: Place) -> Result<Draft, ConfigError> {
        let listen_place = place.key("listen");
        within(self.listen.0.len(), 1, MAX_LISTEN, &listen_place)?;
        let listen = self.listen.0.iter().enumerate();
        let listen = listen
            .flat_map(|(index, Text(text))| Said::listen(text, &listen_place.index(index)))
            .collect();
        let Protocol = self.protocol.map_or(Protocol, |protocol| protocol.0);
        let default = Policy::default();
        let policy = Policy {
            socket_mode: self.socket_mode.map_or(default.socket_mode, |mode| mode.0.0),
            max_connections: self.max_connections.map_or(default.max_connections, |most| most.0.0),
            max_pending: self.max_pending.map(|most| most.0.0),
            per_endpoint: Limits {
                connections: self.per_endpoint.max_connections.map(|most| most.0.0),
                pending: self.per_endpoint.max_pending.map(|most| most.0.0),
            },
            idle_timeout: self.idle_timeout.map(|time| time.0.0).filter(|time| !time.is_zero()),
            tier: self.tier.map_or(default.tier, |tier| tier.0),
            clients: self.clients.map_or(default.clients, |clients| clients.0),
        };
        let name = Some(self.name.unwrap_or(self.upstream).0);
        Ok(Draft { place, name, listen, service, policy })
    }
}

/// Checks the length of a list.
pub(super) fn within(
    length: usize,
    min: usize,
    max: usize,
    place: &Place,
) -> Result<(), ConfigError> {
    if (min..=max).contains(&length) {
        return Ok(());
    }
    let problem = if length < min {
        Problem::new("the list is empty", format!("write at least {min}"))
    } else {
        Problem::new(format!("the list has {length} entries"), format!("write at most {max}"))
    };
    Err(problem.at(place))
}

fn unknown_upstream<'a>(name: &Name, known: impl Iterator<Item = &'a Name>) -> Problem {
    let what = format!("there is no upstream {}", quote(name.as_str()));
    match nearest(name.as_str(), known.map(Name::as_str)) {
        Some(near) => Problem::slip(what, near),
        None => Problem::new(what, format!("define it as upstreams.{name}")),
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(VersionVisitor)
    }
}

struct VersionVisitor;

impl Visitor<'_> for VersionVisitor {
    type Value = Version;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("version: 1")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Version, E> {
        match number {
            1 => Ok(Version),
            _ => Err(E::custom(Problem::new(
                format!("version {number} is not known to this release"),
                "write version: 1",
            ))),
        }
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Version, E> {
        self.visit_u64(u64::try_from(number).unwrap_or(0))
    }
}

impl JsonSchema for Version {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Version".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "const": 1 })
    }
}

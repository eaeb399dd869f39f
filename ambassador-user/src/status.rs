//! What is told of a running ambassador: the same facts as JSON and as text.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::sync::PoisonError;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::{Profile, Tier};
use crate::datapath::known_bad;
use crate::drain::Phase;
use crate::privileges;
use crate::service::Service;
use crate::tier::{Choice, WhyNot};
use crate::upstream::host::Host;

/// The whole of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub phase: Phase,
    pub ready: bool,
    pub uptime_seconds: u64,
    pub user: u32,
    pub capabilities: String,
    pub config: ConfigStatus,
    pub routes: Vec<RouteStatus>,
    /// Connections that the connect hooks left to the listeners, by the reason; none without `direct`.
    pub direct_missed: BTreeMap<String, u64>,
    /// Those of this kernel that `sockmap` may meet, if it can be used.
    pub known_bugs: Vec<String>,
}

/// The configuration in force.
#[derive(Debug, Serialize, Deserialize)]
pub struct ConfigStatus {
    /// Null if flags and variables say everything.
    pub file: Option<String>,
    /// Of that file's text.
    pub sha256: Option<String>,
    /// Null if the upstreams are the same everywhere.
    pub profile: Option<ProfileStatus>,
    /// When it was put in force.
    pub loaded: String,
    /// What of it is not, before a restart.
    pub needs_restart: Vec<String>,
    /// Since then: what was refused last.
    pub refused: Option<RefusedStatus>,
}

/// Which of the upstreams' profiles is in force, and why.
#[derive(Debug, Serialize, Deserialize)]
pub struct ProfileStatus {
    pub name: String,
    pub evidence: String,
}

/// A configuration that was refused.
#[derive(Debug, Serialize, Deserialize)]
pub struct RefusedStatus {
    pub at: String,
    pub why: String,
}

/// One route.
#[derive(Debug, Serialize, Deserialize)]
pub struct RouteStatus {
    pub name: String,
    pub listen: Vec<String>,
    pub tier: String,
    /// What carries the connections that the tier leaves to user space.
    pub relay: String,
    /// Why no higher tier.
    pub why_not: Vec<WhyNot>,
    pub connections: u32,
    pub max_connections: u32,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub upstream: String,
    pub endpoints: Vec<EndpointStatus>,
}

/// One endpoint of a route's upstream.
#[derive(Debug, Serialize, Deserialize)]
pub struct EndpointStatus {
    pub endpoint: String,
    pub weight: u32,
    pub connections: u32,
    /// What its name resolves to, or why it does not; empty for a literal address.
    pub addresses: String,
    /// Whether connections may go there.
    pub healthy: bool,
    pub ejections: u64,
    pub hosts: Vec<HostStatus>,
}

/// One address of an endpoint.
#[derive(Debug, Serialize, Deserialize)]
pub struct HostStatus {
    pub address: String,
    pub healthy: bool,
    /// `healthy`, or why connections do not go there.
    pub health: String,
}

/// One live connection.
#[derive(Debug, Serialize, Deserialize)]
pub struct ConnectionStatus {
    pub id: u64,
    pub route: String,
    pub peer: String,
    /// Empty while connecting.
    pub endpoint: String,
    pub tier: String,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub age_seconds: f64,
}

impl Status {
    pub async fn of(service: &Service) -> Self {
        service.settle().await;
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            phase: service.drain.phase(),
            ready: service.not_ready().is_none(),
            uptime_seconds: service.started.elapsed().as_secs(),
            user: privileges::effective_user(),
            capabilities: match &service.direct {
                Some(direct) if direct.ends_connections() => {
                    format!("{}, and CAP_NET_ADMIN to end connections", privileges::held())
                }
                _ => privileges::held(),
            },
            config: ConfigStatus::of(service),
            direct_missed: service
                .direct
                .iter()
                .flat_map(|direct| direct.missed())
                .map(|(reason, count)| (reason.to_owned(), count))
                .collect(),
            known_bugs: service
                .sockmap
                .iter()
                .flat_map(|_sockmap| known_bad::here())
                .map(|bug| bug.to_string())
                .collect(),
            routes: service
                .routes()
                .iter()
                .map(|route| {
                    let (bytes_up, bytes_down) = route.metrics.bytes();
                    let Choice { tier, relay, why_not } = route.choice();
                    RouteStatus {
                        name: route.name.to_string(),
                        listen: route.meant().listen.iter().map(ToString::to_string).collect(),
                        tier: tier.to_string(),
                        relay: relay.to_string(),
                        why_not,
                        connections: route.active(),
                        max_connections: route.max_connections,
                        bytes_up,
                        bytes_down,
                        upstream: route.upstream.name.to_string(),
                        endpoints: route
                            .upstream
                            .endpoints()
                            .iter()
                            .map(|endpoint| EndpointStatus {
                                endpoint: endpoint.label().to_string(),
                                weight: endpoint.weight(),
                                connections: endpoint.active()
                                    + service
                                        .direct
                                        .as_ref()
                                        .map_or(0, |direct| direct.reached(&route.name, endpoint)),
                                addresses: endpoint.known(),
                                healthy: endpoint.is_good(),
                                ejections: endpoint.ejections(),
                                hosts: endpoint
                                    .hosts()
                                    .iter()
                                    .map(|it| HostStatus::of(it))
                                    .collect(),
                            })
                            .collect(),
                    }
                })
                .collect(),
        }
    }
}

impl HostStatus {
    fn of(host: &Host) -> Self {
        let health = host.health();
        Self { address: host.at.to_string(), healthy: health.is_good(), health: health.to_string() }
    }
}

impl ConfigStatus {
    fn of(service: &Service) -> Self {
        let loaded = service.loaded.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let shown = |time| humantime::format_rfc3339_seconds(time).to_string();
        Self {
            file: loaded.file.map(|file| file.display().to_string()),
            sha256: loaded.sha256,
            profile: loaded.profile.map(|Profile { name, evidence }| ProfileStatus {
                name: name.to_string(),
                evidence,
            }),
            loaded: shown(loaded.at),
            needs_restart: loaded.needs_restart,
            refused: loaded.refusal.map(|(at, why)| RefusedStatus { at: shown(at), why }),
        }
    }
}

impl fmt::Display for ConfigStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.as_deref().unwrap_or("flags and variables");
        let digest = self.sha256.as_deref().unwrap_or_default();
        let digest = digest.get(..12).map(|start| format!(" (sha256 {start}...)"));
        writeln!(f, "config {file}{}, since {}", digest.unwrap_or_default(), self.loaded)?;
        if let Some(ProfileStatus { name, evidence }) = &self.profile {
            writeln!(f, "profile {name}: {evidence}")?;
        }
        if !self.needs_restart.is_empty() {
            writeln!(f, "config needs a restart for {}", self.needs_restart.join(", "))?;
        }
        if let Some(RefusedStatus { at, why }) = &self.refused {
            writeln!(f, "config refused at {at}: {why}")?;
        }
        Ok(())
    }
}

/// The live connections: those that came to us, then those that the kernel made past us, oldest first.
pub async fn connections(service: &Service) -> Vec<ConnectionStatus> {
    let ours = service.connections.list();
    let ours = ours.iter().map(|about| ConnectionStatus {
        id: about.id,
        route: about.route().name.to_string(),
        peer: about.peer.to_string(),
        endpoint: about.endpoint.get().map(ToString::to_string).unwrap_or_default(),
        tier: about.tier().to_string(),
        bytes_up: about.traffic.up(),
        bytes_down: about.traffic.down(),
        age_seconds: about.age().as_secs_f64(),
    });
    let mut all: Vec<_> = ours.collect();
    if let Some(direct) = service.direct.clone() {
        let past_us = tokio::task::spawn_blocking(move || direct.open()).await.unwrap_or_default();
        all.extend(past_us.into_iter().map(|open| ConnectionStatus {
            id: open.cookie,
            route: open.route.to_string(),
            peer: open.peer.to_string(),
            endpoint: open.endpoint.to_string(),
            tier: Tier::Direct.to_string(),
            bytes_up: open.bytes.0,
            bytes_down: open.bytes.1,
            age_seconds: open.age.as_secs_f64(),
        }));
    }
    all
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = match self.phase {
            Phase::Serving if self.ready => "serving",
            Phase::Serving => "serving, but not ready",
            Phase::Grace => "draining, still accepting",
            Phase::Finishing => "draining",
        };
        let uptime = humantime::format_duration(Duration::from_secs(self.uptime_seconds));
        writeln!(f, "ambassador {}: {phase}, up {uptime}", self.version)?;
        writeln!(f, "user {}, capabilities {}", self.user, self.capabilities)?;
        write!(f, "{}", self.config)?;
        for route in &self.routes {
            writeln!(f, "\n{} on {}", route.name, route.listen.join(", "))?;
            writeln!(f, "  tier         {}", route.carried())?;
            writeln!(f, "  connections  {} of {}", route.connections, route.max_connections)?;
            writeln!(f, "  bytes        {} up, {} down", route.bytes_up, route.bytes_down)?;
            writeln!(f, "  upstream     {}", route.upstream)?;
            for endpoint in &route.endpoints {
                write!(f, "    {}", endpoint.endpoint)?;
                if !endpoint.addresses.is_empty() {
                    write!(f, " = {}", endpoint.addresses)?;
                }
                writeln!(f, "  weight {}, {} connections", endpoint.weight, endpoint.connections)?;
                for host in endpoint.hosts.iter().filter(|host| !host.healthy) {
                    writeln!(f, "      {} is {}", host.address, host.health)?;
                }
            }
        }
        Ok(())
    }
}

impl Status {
    /// What has kept connections from `direct` routes' hooks, if anything has.
    pub fn explanation_of_misses(&self) -> Option<String> {
        let count = |reason: &str| self.direct_missed.get(reason).copied().unwrap_or(0);
        let (bound, no_target, no_room) = (count("bound"), count("no_target"), count("no_room"));
        (bound + no_target + no_room > 0).then(|| {
            format!(
                "left to the listeners so far, though their routes are direct: {bound} that chose their \
                 own source address, {no_target} for which no endpoint was free or sure, {no_room} for lack of room"
            )
        })
    }
}

impl RouteStatus {
    /// The tier in force, and what carries the rest.
    fn carried(&self) -> String {
        if self.tier == self.relay {
            return self.tier.clone();
        }
        format!("{}; {} for connections that come to the listener", self.tier, self.relay)
    }

    /// The tier in force, and each higher tier with the reason it is not: one a line.
    pub fn explanation(&self) -> String {
        let mut text = format!("{}: {}\n", self.name, self.carried());
        for WhyNot { tier, reason } in &self.why_not {
            text.push_str(&format!("  {tier}: not used: {reason}\n"));
        }
        text
    }
}

impl fmt::Display for ConnectionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoint = if self.endpoint.is_empty() { "(connecting)" } else { &self.endpoint };
        write!(
            f,
            "{:>6}  {}  {} -> {endpoint}  {}  {} up, {} down  {:.1} s",
            self.id,
            self.route,
            self.peer,
            self.tier,
            self.bytes_up,
            self.bytes_down,
            self.age_seconds
        )
    }
}

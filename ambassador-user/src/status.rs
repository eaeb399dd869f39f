//! What is told of a running ambassador: the same facts as JSON and as text.
#![forbid(unsafe_code)]

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::drain::Phase;
use crate::privileges;
use crate::service::Service;

/// The whole of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub phase: Phase,
    pub ready: bool,
    pub uptime_seconds: u64,
    pub user: u32,
    pub capabilities: String,
    pub routes: Vec<RouteStatus>,
}

/// One route.
#[derive(Debug, Serialize, Deserialize)]
pub struct RouteStatus {
    pub name: String,
    pub listen: Vec<String>,
    pub tier: String,
    /// Why no higher tier.
    pub reason: String,
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
    pub fn of(service: &Service) -> Self {
        service.connections.settle();
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            phase: service.drain.phase(),
            ready: service.ready(),
            uptime_seconds: service.started.elapsed().as_secs(),
            user: privileges::effective_user(),
            capabilities: privileges::held(),
            routes: service
                .routes
                .iter()
                .map(|(route, meant)| {
                    let (bytes_up, bytes_down) = route.bytes();
                    RouteStatus {
                        name: route.name.to_string(),
                        listen: meant.listen.iter().map(ToString::to_string).collect(),
                        tier: route.tier.to_string(),
                        reason: route.tier_reason.clone(),
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
                                connections: endpoint.active(),
                                addresses: endpoint.known(),
                            })
                            .collect(),
                    }
                })
                .collect(),
        }
    }
}

/// The live connections, oldest first.
pub fn connections(service: &Service) -> Vec<ConnectionStatus> {
    service
        .connections
        .list()
        .iter()
        .map(|about| ConnectionStatus {
            id: about.id,
            route: about.route().name.to_string(),
            peer: about.peer.to_string(),
            endpoint: about.endpoint.get().map(ToString::to_string).unwrap_or_default(),
            tier: about.route().tier.to_string(),
            bytes_up: about.traffic.up(),
            bytes_down: about.traffic.down(),
            age_seconds: about.age().as_secs_f64(),
        })
        .collect()
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = match self.phase {
            Phase::Serving => "serving",
            Phase::Grace => "draining, still accepting",
            Phase::Finishing => "draining",
        };
        let uptime = humantime::format_duration(Duration::from_secs(self.uptime_seconds));
        writeln!(f, "ambassador {}: {phase}, up {uptime}", self.version)?;
        writeln!(f, "user {}, capabilities {}", self.user, self.capabilities)?;
        for route in &self.routes {
            writeln!(f, "\n{} on {}", route.name, route.listen.join(", "))?;
            writeln!(f, "  tier         {} ({})", route.tier, route.reason)?;
            writeln!(f, "  connections  {} of {}", route.connections, route.max_connections)?;
            writeln!(f, "  bytes        {} up, {} down", route.bytes_up, route.bytes_down)?;
            writeln!(f, "  upstream     {}", route.upstream)?;
            for endpoint in &route.endpoints {
                write!(f, "    {}", endpoint.endpoint)?;
                if !endpoint.addresses.is_empty() {
                    write!(f, " = {}", endpoint.addresses)?;
                }
                writeln!(f, "  weight {}, {} connections", endpoint.weight, endpoint.connections)?;
            }
        }
        Ok(())
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

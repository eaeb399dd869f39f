//! The loads there are, a line each: what a run without `--only` measures, in this order.

use ambassador::bench::load::transfer::Direction;
use ambassador_tests::pool::Dialect;
use clap::ValueEnum;
use clap::builder::PossibleValue;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::failing::Failure;

/// Every load.
pub(crate) const LOADS: &[Load] = &[
    quick("get", "redis-benchmark, GET, 50 connections", Kind::Redis { pipeline: 1 }),
    quick(
        "get-pipelined",
        "redis-benchmark, GET, 50 connections, 16 requests in flight on each",
        Kind::Redis { pipeline: 16 },
    ),
    full("select", "pgbench, select-only, 1 client", Kind::Postgres { clients: 1 }),
    quick("select-16", "pgbench, select-only, 16 clients", Kind::Postgres { clients: 16 }),
    quick("round-trips", "64 bytes there and back, 1 connection", round_trips(1, 64)),
    quick("round-trips-64", "64 bytes there and back, 64 connections", round_trips(64, 64)),
    full("round-trips-4k", "4 KiB there and back, 1 connection", round_trips(1, 4096)),
    full("round-trips-4k-64", "4 KiB there and back, 64 connections", round_trips(64, 4096)),
    quick("upload", "One connection that sends as fast as it can", transfer(Direction::Up, 1)),
    full("upload-8", "8 connections that send as fast as they can", transfer(Direction::Up, 8)),
    quick(
        "download",
        "One connection that receives as fast as it can",
        transfer(Direction::Down, 1),
    ),
    full(
        "download-8",
        "8 connections that receive as fast as they can",
        transfer(Direction::Down, 8),
    ),
    quick("connections", "Connect, one round trip, close, by 8 clients at once", Kind::Connections),
    quick(
        "idle",
        "1,000 connections that have done one round trip each and wait",
        Kind::Idle { connections: 1000 },
    ),
    full("idle-5000", "5,000 connections that wait", Kind::Idle { connections: 5000 }),
    quick("start", "From the start to the first reply, one route", Kind::StartUp),
    over(100, "start-100", "From the start to the first reply, 100 routes", Kind::StartUp),
    over(1000, "start-1000", "From the start to the first reply, 1,000 routes", Kind::StartUp),
    full("round-trips-1000", "64 bytes there and back, 1,000 connections", round_trips(1000, 64)),
    full("round-trips-5000", "64 bytes there and back, 5,000 connections", round_trips(5000, 64)),
    over(
        100,
        "routes-100",
        "64 bytes there and back, 64 connections over 100 routes",
        round_trips(64, 64),
    ),
    over(
        1000,
        "routes-1000",
        "64 bytes there and back, 64 connections over 1,000 routes",
        round_trips(64, 64),
    ),
    over(1000, "reload", "A reload that moves one of 1,000 routes, under traffic", Kind::Reload),
    over(1000, "checks", "1,000 endpoints are checked, each every 5 s", Kind::Checks),
    failover("redis-killed", "Redis is killed", Dialect::Redis, Failure::Killed),
    failover("redis-stopped", "Redis stops to answer", Dialect::Redis, Failure::Stopped),
    failover(
        "redis-unreachable",
        "Redis cannot be reached any more",
        Dialect::Redis,
        Failure::Unreachable,
    ),
    failover(
        "redis-resetting",
        "Redis accepts connections and resets them",
        Dialect::Redis,
        Failure::Resetting,
    ),
    failover("postgres-killed", "PostgreSQL is killed", Dialect::Postgres, Failure::Killed),
    failover("postgres-stopped", "PostgreSQL stops to answer", Dialect::Postgres, Failure::Stopped),
    failover(
        "postgres-unreachable",
        "PostgreSQL cannot be reached any more",
        Dialect::Postgres,
        Failure::Unreachable,
    ),
    failover(
        "postgres-resetting",
        "PostgreSQL accepts connections and resets them",
        Dialect::Postgres,
        Failure::Resetting,
    ),
];

const fn quick(name: &'static str, title: &'static str, kind: Kind) -> Load {
    Load { name, title, kind, routes: 1, quick: true }
}

const fn full(name: &'static str, title: &'static str, kind: Kind) -> Load {
    over(1, name, title, kind)
}

const fn over(routes: usize, name: &'static str, title: &'static str, kind: Kind) -> Load {
    Load { name, title, kind, routes, quick: false }
}

const fn round_trips(connections: usize, size: usize) -> Kind {
    Kind::RoundTrips { connections, size }
}

const fn transfer(direction: Direction, streams: u16) -> Kind {
    Kind::Transfer { direction, streams }
}

const fn failover(
    name: &'static str,
    title: &'static str,
    dialect: Dialect,
    failure: Failure,
) -> Load {
    full(name, title, Kind::Failover { dialect, failure })
}

/// Something that can be measured, by a name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Load {
    /// The name on the command line and in the results file.
    pub(crate) name: &'static str,
    /// What is measured, for a heading.
    pub(crate) title: &'static str,
    /// What is done.
    pub(crate) kind: Kind,
    /// Over how many routes, each at a port of its own.
    pub(crate) routes: usize,
    /// Whether a quick run has time for it.
    pub(crate) quick: bool,
}

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// redis-benchmark's GET, so many requests at a time on each connection.
    Redis { pipeline: u32 },
    /// pgbench's select-only.
    Postgres { clients: u64 },
    /// Messages of `size` bytes there and back, one at a time on each connection.
    RoundTrips { connections: usize, size: usize },
    /// Bulk, one way.
    Transfer { direction: Direction, streams: u16 },
    /// Connections that come and go.
    Connections,
    /// Connections that wait.
    Idle { connections: usize },
    /// The start of the proxy itself.
    StartUp,
    /// Another configuration for the proxy, while others go on.
    Reload,
    /// Nothing: the proxy asks the endpoint of each route whether it works.
    Checks,
    /// The first of two servers fails.
    Failover { dialect: Dialect, failure: Failure },
}

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    /// The [built-in upstream](super::upstream).
    BuiltIn,
    /// A Redis server.
    Redis,
    /// A PostgreSQL server.
    Postgres,
}

impl Load {
    /// Who answers it.
    pub(crate) fn service(self) -> Service {
        match self.kind {
            Kind::Redis { .. } | Kind::Failover { dialect: Dialect::Redis, .. } => Service::Redis,
            Kind::Postgres { .. } | Kind::Failover { dialect: Dialect::Postgres, .. } => {
                Service::Postgres
            }
            _ => Service::BuiltIn,
        }
    }

    /// How many connections it has open at once, about.
    pub(crate) fn connections(self) -> usize {
        match self.kind {
            Kind::RoundTrips { connections, .. } | Kind::Idle { connections } => connections,
            _ => 64,
        }
    }

    /// How many ports a proxy needs for its routes: one of them moves in a reload.
    pub(crate) fn ports(self) -> usize {
        self.routes + usize::from(self.kind == Kind::Reload)
    }

    /// How many files it has open at most in one process: clients and the built-in upstream share one,
    /// with the ports that are set aside; a proxy has both ends.
    pub(crate) fn descriptors(self) -> u64 {
        (2 * self.connections() + self.ports() + 500) as u64
    }
}

impl ValueEnum for Load {
    fn value_variants<'a>() -> &'a [Self] {
        LOADS
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name).help(self.title))
    }
}

/// As its name.
impl Serialize for Load {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.name.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Load {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let known = LOADS.iter().find(|load| load.name == name);
        known.copied().ok_or_else(|| D::Error::custom(format!("there is no load {name}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_load_has_a_name_of_its_own() {
        for load in LOADS {
            let name = serde_json::to_value(load).expect("write");
            assert_eq!(serde_json::from_value::<Load>(name).ok(), Some(*load));
        }
    }
}

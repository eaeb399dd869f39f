//! What is meant: the one configuration everything deeper works from, already parsed and checked.
//!
//! Nothing below this module sees a raw string, a "maybe unset" or an environment variable.
#![forbid(unsafe_code)]

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::{NonZeroU16, NonZeroU32};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

mod acceleration;
mod address;
mod document;
mod environment;
mod evidence;
mod file;
mod health;
mod layer;
mod listeners;
mod name;
mod problem;
mod profile;
mod resilience;
mod resolve;
mod shorthand;
mod text;
mod upstream;
mod value;
mod words;

pub use environment::Environment;
pub use health::{
    Account, Ask, AskHttp, AskRedis, CheckText, HttpHost, HttpPath, PasswordFile, PostgresLogin,
    RedisLogin, Role, Statuses,
};
pub use problem::{ConfigError, Problem, Warning};
pub use resilience::{Eject, Health, Limits, OnUnhealthy};
pub use resolve::Resolved;

pub(crate) use acceleration::InstanceText;
pub(crate) use document::Document;
pub(crate) use file::schema;
pub(crate) use layer::{Draft, Layer, Policy, Said, Settings};
pub(crate) use problem::{Place, nearest, one_line, quote};
pub(crate) use resolve::resolve;
pub(crate) use value::{ControlText, HttpText, Within};

/// The exit code that says it is bad (EX_CONFIG of sysexits.h).
pub const BAD_CONFIG: u8 = 78;

/// The whole configuration of one ambassador.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub admin: Admin,
    pub acceleration: Acceleration,
    pub drain: Drain,
    /// `None` if the upstreams are the same everywhere.
    pub profile: Option<Profile>,
    pub routes: Vec<Route>,
}

/// Which of the upstreams' profiles is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    pub name: Arc<str>,
    /// Why this one, in words.
    pub evidence: String,
}

/// Where people and probes reach the ambassador.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// Probes and metrics, read-only; `None` when switched off.
    pub http: Option<SocketAddr>,
    pub control: Control,
    pub ready_when: ReadyWhen,
}

/// What it takes to be ready, besides that no drain has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReadyWhen {
    /// All routes are bound. A database that is down does not take the Pod out of service.
    #[default]
    Bound,
    /// And every one of them has an endpoint that is healthy.
    Healthy,
}

/// The control socket: everything that changes state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// Asked for: failing to bind it is an error.
    At(PathBuf),
    /// The built-in default: where it cannot be bound the ambassador runs without, and says so.
    IfPossible(PathBuf),
    Off,
}

/// Which tiers the user allows, below which nothing may start, and how the kernel tiers behave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acceleration {
    pub tier: TierLimit,
    pub require: Option<Tier>,
    pub cgroup: Cgroup,
    /// The name that the kernel half is pinned under; `None`: derived from the network namespace.
    pub instance: Option<Arc<str>>,
    /// How long after the ambassador was last seen alive the kernel goes on sending new connections by
    /// its tables; `None`: for ever.
    pub stale_after: Option<Duration>,
    pub inflight: InFlight,
}

/// The cgroup whose sockets the kernel tiers serve.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Cgroup {
    /// The pod's, found at run time.
    #[default]
    Auto,
    At(PathBuf),
}

/// What one connection of the sockmap tier may have under way in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InFlight {
    pub bytes: NonZeroU32,
    pub messages: NonZeroU32,
}

/// What the clients of a route are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Clients {
    /// Unknown: each socket is looked at.
    #[default]
    Any,
    /// All of them use non-blocking sockets; the user vouches for it.
    NonBlocking,
}

/// What carries a route's bytes, from the lowest to the highest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    Copy,
    Splice,
    Sockmap,
    Direct,
}

/// The highest tier that is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TierLimit {
    /// The best that works here.
    #[default]
    Auto,
    AtMost(Tier),
}

/// After SIGTERM: keep accepting for `grace`, then finish, and cut what is left at `deadline`.
/// Both count from the signal; `grace <= deadline`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    pub grace: Duration,
    pub deadline: Duration,
}

/// One set of listen addresses to one upstream, with its policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub name: Arc<str>,
    pub listen: Vec<Listen>,
    /// File mode of this route's Unix sockets.
    pub socket_mode: u32,
    pub upstream: Arc<Upstream>,
    pub max_connections: NonZeroU32,
    /// Most connections that are on their way to the upstream; `None`: as many as may be open.
    pub max_pending: Option<NonZeroU32>,
    pub per_endpoint: Limits,
    /// `None`: none, as a direct connection has none.
    pub idle_timeout: Option<Duration>,
    pub tier: TierLimit,
    pub clients: Clients,
}

/// One address a route listens on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Listen {
    /// `if_available`: the `::1` that a bare `PORT` stands for, which a Pod without IPv6 does not have.
    Tcp {
        address: SocketAddr,
        if_available: bool,
    },
    Unix(PathBuf),
}

/// A service and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    pub name: Arc<str>,
    pub endpoints: Vec<Endpoint>,
    pub balance: Balance,
    pub connect: Connect,
    pub dns: Dns,
    /// `None`: nobody asks whether it works.
    pub health: Option<Health>,
    /// `None`: whatever becomes of connections, no host is taken out for it.
    pub eject: Option<Eject>,
    pub on_unhealthy: OnUnhealthy,
}

/// One place a service is reached at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub target: Target,
    pub weight: NonZeroU16,
}

/// The address of an endpoint as the user gave it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// Resolved by DNS and /etc/hosts, again and again.
    Name {
        host: Arc<str>,
        port: u16,
    },
    /// Resolved by its SRV records, which tell the ports, again and again.
    Service(Arc<str>),
    Address(SocketAddr),
    Unix(PathBuf),
}

/// How the next endpoint is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Balance {
    /// In the order written; the next only when the ones before it fail.
    #[default]
    Failover,
    /// As failover, but what is in use stays in use when one before it is back.
    FailoverSticky,
    /// In turn, in proportion to the weights.
    RoundRobin,
    /// The one with the fewest connections for its weight.
    LeastConnections,
    /// The less busy one of two that are drawn by weight.
    RandomTwo,
    /// By where a connection comes from, in proportion to the weights.
    SourceHash,
}

/// How a connection to an upstream is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connect {
    /// For one attempt.
    pub timeout: Duration,
    /// Each on another endpoint, while there is one left.
    pub attempts: NonZeroU32,
    /// How long a connection waits while no endpoint can be reached.
    pub hold: Duration,
}

/// How long an answer of DNS is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dns {
    pub min_ttl: Duration,
    pub max_ttl: Duration,
    /// Keep the last good addresses while DNS fails.
    pub stale: bool,
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "profile {}: {}", self.name, self.evidence)
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self {
            http: Some((Ipv4Addr::UNSPECIFIED, 9090).into()),
            control: Control::default(),
            ready_when: ReadyWhen::default(),
        }
    }
}

impl Default for Control {
    fn default() -> Self {
        Self::IfPossible(PathBuf::from("/run/ambassador/control.sock"))
    }
}

impl Default for Acceleration {
    fn default() -> Self {
        Self {
            tier: TierLimit::Auto,
            require: None,
            cgroup: Cgroup::Auto,
            instance: None,
            stale_after: Some(Duration::from_secs(600)),
            inflight: InFlight::default(),
        }
    }
}

impl Default for InFlight {
    fn default() -> Self {
        Self {
            bytes: const { NonZeroU32::new(1 << 20).unwrap() },
            messages: const { NonZeroU32::new(2048).unwrap() },
        }
    }
}

impl Default for Drain {
    fn default() -> Self {
        Self { grace: Duration::ZERO, deadline: Duration::from_secs(25) }
    }
}

impl Default for Connect {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(2),
            attempts: const { NonZeroU32::new(3).unwrap() },
            hold: Duration::ZERO,
        }
    }
}

impl Default for Dns {
    fn default() -> Self {
        Self { min_ttl: Duration::from_secs(1), max_ttl: Duration::from_secs(30), stale: true }
    }
}

impl Upstream {
    /// Whether connections to a host that is not good any more are to be ended.
    pub fn closes_unhealthy(&self) -> bool {
        self.on_unhealthy == OnUnhealthy::Close
    }
}

impl TierLimit {
    /// What both limits allow.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Auto, limit) | (limit, Self::Auto) => limit,
            (Self::AtMost(one), Self::AtMost(other)) => Self::AtMost(one.min(other)),
        }
    }

    /// Whether this limit allows `tier`.
    pub fn allows(self, tier: Tier) -> bool {
        match self {
            Self::Auto => true,
            Self::AtMost(highest) => tier <= highest,
        }
    }
}

//! The configurations that an ambassador is given, all of which lead to the same servers.

use std::net::SocketAddr;
use std::time::Duration;

use ambassador_tests::address::Address;
use ambassador_tests::noise::Noise;

/// So long a connection waits for a server where it does.
pub(crate) const HOLD: Duration = Duration::from_secs(4);

const CLOSES: u64 = 12;

/// What to choose among, all of it at random but for the first one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Variation(u64);

/// What does not vary.
#[derive(Debug)]
pub(crate) struct Theme {
    pub(crate) route: Address,
    /// Where another route listens, if there is one.
    pub(crate) extra: SocketAddr,
    /// Of servers, and in the end a name of two more.
    pub(crate) endpoints: Vec<String>,
}

impl Variation {
    /// All servers in turn, and nothing special.
    pub(crate) const PLAIN: Self = Self(0);

    pub(crate) fn of(noise: &mut Noise) -> Self {
        Self(noise.below(1 << 13))
    }

    /// The same, but for that connections to whoever is taken for lost are given up.
    pub(crate) fn closing(self) -> Self {
        Self(self.0 | 1 << CLOSES)
    }

    /// Which of the endpoints there are, the first one being 0.
    pub(crate) fn first_endpoint(self) -> usize {
        [0, 0, 1, 3][(self.0 >> 4 & 3) as usize]
    }

    /// Whether connections to whoever is taken for lost are given up.
    pub(crate) fn closes(self) -> bool {
        self.bit(CLOSES)
    }

    /// Whether connections wait while no server can be reached.
    pub(crate) fn holds(self) -> bool {
        self.bit(9)
    }

    fn bit(self, number: u64) -> bool {
        self.0 >> number & 1 == 1
    }

    pub(crate) fn text(self, theme: &Theme) -> String {
        let Theme { route, extra, endpoints } = theme;
        let balance = [
            "round_robin",
            "least_connections",
            "random_two",
            "failover",
            "failover_sticky",
            "source_hash",
        ];
        let balance = balance[(self.0 % 6) as usize];
        let endpoints = &endpoints[self.first_endpoint()..];
        let endpoints: Vec<_> = endpoints.iter().map(|it| format!("'{it}'")).collect();
        let endpoints = endpoints.join(", ");
        let extra = match self.bit(6) {
            true => format!("  - {{ name: extra, listen: '{extra}', upstream: u }}\n"),
            false => String::new(),
        };
        let either = |number, one, other| if self.bit(number) { one } else { other };
        let checks = "health: { check: tcp, interval: 200ms, timeout: 700ms, fall: 2 }";
        let health = either(7, checks, "");
        let limit = either(8, "5000", "10000");
        let hold = if self.holds() { HOLD } else { Duration::ZERO }.as_secs();
        // More than there are callers, with which the kernel counts.
        let each = either(10, ", per_endpoint: { max_connections: 500, max_pending: 200 }", "");
        let timeout = either(11, "3s", "700ms");
        let unhealthy = if self.closes() { "close" } else { "keep" };
        format!(
            "version: 1
routes:
  - {{ name: soaked, listen: '{route}', upstream: u, max_connections: {limit}{each} }}
{extra}upstreams:
  u:
    endpoints: [{endpoints}]
    balance: {balance}
    connect: {{ timeout: {timeout}, attempts: 5, hold: {hold}s }}
    dns: {{ max_ttl: 1s }}
    eject: {{ consecutive_failures: 2, for: 500ms }}
    on_unhealthy: {unhealthy}
    {health}
"
        )
    }
}

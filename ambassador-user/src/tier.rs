//! The ladder: which tier carries a route, and why each higher one does not.
#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::config::{self, Clients, Listen, Target, Tier, TierLimit};
use crate::proxy::splice;

/// The exit code that says so (EX_NOPERM of sysexits.h).
pub const REQUIRED_TIER_MISSING: u8 = 77;

/// Every tier, from the highest to the lowest.
pub const TIERS: [Tier; 4] = [Tier::Direct, Tier::Sockmap, Tier::Splice, Tier::Copy];

/// Why `auto` keeps from `sockmap` where clients may notice it.
pub const SOCKMAP_IS_NOTICED: &str = "on this kernel non-blocking clients may notice it too, because \
    FIONREAD does not count what waits for them; ask for it with `tier: sockmap` or `clients: nonblocking`";

/// What of each tier works on this machine: why it cannot be used, `None` when it can.
#[derive(Debug, Clone, Default)]
pub struct Ladder {
    pub no_direct: Option<String>,
    pub no_sockmap: Option<String>,
    /// Why `sockmap` is not taken for routes that do not ask for it.
    pub no_sockmap_unasked: Option<String>,
    pub no_splice: Option<String>,
    /// Why connections that the kernel made cannot be ended here.
    pub no_end: Option<String>,
}

/// The tier of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    pub tier: Tier,
    /// What carries the connections that come to our listeners all the same.
    pub relay: Tier,
    /// Why no higher one, from the highest on.
    pub why_not: Vec<WhyNot>,
}

/// Why a tier does not carry a route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhyNot {
    pub tier: String,
    pub reason: String,
}

impl Ladder {
    /// What works in user space, found out by moving real bytes in less than a millisecond; the kernel
    /// tiers are as they are said to be.
    pub fn probe(kernel_tiers: Self) -> Self {
        let no_splice = splice::probe().err().map(|error| format!("{error:#}"));
        Self { no_splice, ..kernel_tiers }
    }

    /// Why a tier cannot be used here; `None` when it can.
    pub fn obstacle(&self, tier: Tier) -> Option<&str> {
        match tier {
            Tier::Direct => self.no_direct.as_deref(),
            Tier::Sockmap => self.no_sockmap.as_deref(),
            Tier::Splice => self.no_splice.as_deref(),
            Tier::Copy => None,
        }
    }

    /// Whether a route reaches the tier that is required.
    pub fn satisfies(&self, route: &config::Route, required: Tier) -> Result<()> {
        let choice = self.choose(route, route.tier);
        ensure!(
            choice.tier >= required,
            "route {} would be carried by {}, and {required} is required ({}); lower `require` or see \
             `ambassador doctor`",
            route.name,
            choice.tier,
            choice.reason()
        );
        Ok(())
    }

    /// The highest tier that is allowed, works, and does what the route needs.
    pub fn choose(&self, route: &config::Route, limit: TierLimit) -> Choice {
        let asked = asks_for_sockmap(route) || limit == TierLimit::AtMost(Tier::Sockmap);
        self.highest(route, limit, asked)
    }

    fn highest(&self, route: &config::Route, limit: TierLimit, asked: bool) -> Choice {
        let mut why_not = Vec::new();
        let mut fits = |tier: Tier| {
            let reason = if limit.allows(tier) {
                let unfit = unfit(route, tier).map(str::to_owned);
                let to_end = tier == Tier::Direct && route.upstream.closes_unhealthy();
                let no_end = self.no_end.as_ref().filter(|_| to_end);
                let unfit =
                    unfit.or_else(|| no_end.map(|why| format!("on_unhealthy: close: {why}")));
                let unasked = (tier == Tier::Sockmap && !asked)
                    .then(|| self.no_sockmap_unasked.clone())
                    .flatten();
                unfit.or_else(|| self.obstacle(tier).map(str::to_owned)).or(unasked)
            } else {
                Some(format!("not allowed (tier: {limit})"))
            };
            reason.map(|reason| why_not.push(WhyNot { tier: tier.to_string(), reason })).is_none()
        };
        let tier = TIERS.into_iter().find(|tier| fits(*tier)).unwrap_or(Tier::Copy);
        let relay = match tier {
            Tier::Direct => {
                self.highest(route, limit.and(TierLimit::AtMost(Tier::Sockmap)), asked).tier
            }
            relay => relay,
        };
        Choice { tier, relay, why_not }
    }
}

impl Choice {
    /// All reasons in one line.
    pub fn reason(&self) -> String {
        let reasons: Vec<_> = self
            .why_not
            .iter()
            .map(|WhyNot { tier, reason }| format!("{tier}: {reason}"))
            .collect();
        reasons.join("; ")
    }
}

/// Whether a route asks for `sockmap` outright: it takes that its clients may notice.
fn asks_for_sockmap(route: &config::Route) -> bool {
    route.tier == TierLimit::AtMost(Tier::Sockmap) || route.clients == Clients::NonBlocking
}

/// What a route needs that a tier does not give.
fn unfit(route: &config::Route, tier: Tier) -> Option<&'static str> {
    let loopback = |listen: &Listen| matches!(listen, Listen::Tcp { address, .. } if address.ip().is_loopback() || address.ip().is_unspecified());
    let to_unix = route.upstream.endpoints.iter().any(|it| matches!(it.target, Target::Unix(_)));
    match tier {
        Tier::Direct | Tier::Sockmap if to_unix => Some("the upstream is a Unix socket"),
        Tier::Direct | Tier::Sockmap if !route.listen.iter().any(loopback) => {
            Some("the route does not listen on a TCP address of loopback")
        }
        Tier::Direct if route.idle_timeout.is_some() => {
            Some("idle_timeout takes somebody who watches the bytes")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Resolved;

    fn route(listen: &str, endpoint: &str, policy: &str) -> config::Route {
        let text = format!(
            "{{version: 1, routes: [{{listen: '{listen}', upstream: up{policy}}}], \
             upstreams: {{up: {{endpoints: ['{endpoint}']}}}}}}"
        );
        let resolved = Resolved::of_text("c.yaml".as_ref(), text).unwrap();
        resolved.config.routes[0].clone()
    }

    fn plain() -> config::Route {
        route("127.0.0.1:1", "10.0.0.1:2", "")
    }

    fn only_user_space() -> Ladder {
        Ladder {
            no_direct: Some("no cgroup".to_owned()),
            no_sockmap: Some("no cgroup".to_owned()),
            ..Ladder::default()
        }
    }

    #[test]
    fn auto_takes_the_best_that_works() {
        assert_eq!(Ladder::default().choose(&plain(), TierLimit::Auto).tier, Tier::Direct);
        let choice = only_user_space().choose(&plain(), TierLimit::Auto);
        assert_eq!((choice.tier, choice.relay), (Tier::Splice, Tier::Splice));
        assert_eq!(choice.reason(), "direct: no cgroup; sockmap: no cgroup");
    }

    #[test]
    fn what_comes_to_the_listeners_of_a_direct_route_takes_the_next_best_tier() {
        let ladder = Ladder { no_sockmap: Some("old kernel".to_owned()), ..Ladder::default() };
        let choice = ladder.choose(&plain(), TierLimit::Auto);
        assert_eq!((choice.tier, choice.relay), (Tier::Direct, Tier::Splice));
    }

    #[test]
    fn sockmap_that_clients_may_notice_is_taken_by_routes_that_ask_for_it() {
        let noticed = Ladder {
            no_direct: Some("no cgroup".to_owned()),
            no_sockmap_unasked: Some("noticed".to_owned()),
            ..Ladder::default()
        };
        let unasked = noticed.choose(&plain(), TierLimit::Auto);
        assert_eq!(unasked.tier, Tier::Splice);
        assert_eq!(unasked.reason(), "direct: no cgroup; sockmap: noticed");
        for policy in [", tier: sockmap", ", clients: nonblocking"] {
            let route = route("127.0.0.1:1", "10.0.0.1:2", policy);
            assert_eq!(noticed.choose(&route, route.tier).tier, Tier::Sockmap);
        }
        let unnoticed = Ladder { no_sockmap_unasked: None, ..noticed };
        assert_eq!(unnoticed.choose(&plain(), TierLimit::Auto).tier, Tier::Sockmap);
        // What misses the hooks of a direct route asks for nothing.
        let direct = Ladder { no_sockmap_unasked: Some("noticed".to_owned()), ..Ladder::default() };
        assert_eq!(direct.choose(&plain(), TierLimit::Auto).relay, Tier::Splice);
    }

    #[test]
    fn a_limit_is_never_exceeded_and_is_told_as_the_reason() {
        let choice = Ladder::default().choose(&plain(), TierLimit::AtMost(Tier::Copy));
        assert_eq!(choice.tier, Tier::Copy);
        assert!(choice.reason().contains("splice: not allowed (tier: copy)"), "{choice:?}");
    }

    #[test]
    fn a_route_that_needs_somebody_in_between_is_not_direct() {
        let (tcp, upstream) = ("127.0.0.1:1", "10.0.0.1:2");
        for (route, reason) in [
            (route(tcp, upstream, ", idle_timeout: 5s"), "direct: idle_timeout takes"),
            (route(tcp, "unix:/s", ""), "direct: the upstream is a Unix"),
            (route("unix:/s", upstream, ""), "direct: the route does not listen"),
            (route("10.9.9.9:1", upstream, ""), "direct: the route does not listen"),
        ] {
            let choice = Ladder::default().choose(&route, TierLimit::Auto);
            assert_ne!(choice.tier, Tier::Direct);
            assert!(choice.reason().starts_with(reason), "{}", choice.reason());
        }
    }

    #[test]
    fn splice_works_where_the_tests_run() {
        assert_eq!(Ladder::probe(Ladder::default()).obstacle(Tier::Splice), None);
    }
}

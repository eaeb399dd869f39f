//! One route as it runs: its upstream, the tier in force, its limit and its figures.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tracing::warn;

use crate::config;
use crate::config::Tier;
use crate::metrics::{Metrics, RouteMetrics};
use crate::throttle::Throttle;
use crate::tier::Ladder;
use crate::upstream::Upstream;

/// A route in service.
#[derive(Debug)]
pub struct Route {
    pub name: Arc<str>,
    pub upstream: Arc<Upstream>,
    pub tier: Tier,
    /// Why no higher tier.
    pub tier_reason: String,
    pub max_connections: u32,
    pub idle_timeout: Option<Duration>,
    /// Keeps "cannot reach the upstream" from filling the log.
    pub unreachable: Throttle,
    refused: Throttle,
    active: AtomicU32,
    metrics: RouteMetrics,
}

/// A place in a route, given back when dropped.
#[derive(Debug)]
pub struct Admission(Arc<Route>);

impl Route {
    pub fn new(
        meant: &config::Route,
        upstream: Arc<Upstream>,
        ladder: &Ladder,
        metrics: &Metrics,
    ) -> Arc<Self> {
        let (tier, reason) = ladder.choose(meant.tier);
        Arc::new(Self {
            name: Arc::clone(&meant.name),
            upstream,
            tier,
            max_connections: meant.max_connections.get(),
            idle_timeout: meant.idle_timeout,
            unreachable: Throttle::default(),
            refused: Throttle::default(),
            active: AtomicU32::new(0),
            metrics: metrics.route(&meant.name, tier, &reason),
            tier_reason: reason,
        })
    }

    /// A place for one more connection, or a refusal that is counted and, now and then, logged.
    pub fn admit(self: &Arc<Self>) -> Option<Admission> {
        let limit = self.max_connections;
        let place = self.active.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |active| {
            (active < limit).then_some(active + 1)
        });
        if place.is_err() {
            self.metrics.ended("", "refused");
            if let Some(count) = self.refused.say_now() {
                warn!(
                    route = %self.name,
                    refused = count,
                    "refused: {limit} connections are open, which is the route's max_connections"
                );
            }
            return None;
        }
        self.metrics.active.inc();
        Some(Admission(Arc::clone(self)))
    }

    pub fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed)
    }

    pub fn count_bytes(&self, up: u64, down: u64) {
        self.metrics.up.inc_by(up);
        self.metrics.down.inc_by(down);
    }

    /// From accept to an established connection to the upstream.
    pub fn count_connect(&self, took: Duration) {
        self.metrics.connect_seconds.observe(took.as_secs_f64());
    }

    pub fn count_end(&self, endpoint: &str, outcome: &str) {
        self.metrics.ended(endpoint, outcome);
    }

    /// Bytes so far, up and down.
    pub fn bytes(&self) -> (u64, u64) {
        (self.metrics.up.get(), self.metrics.down.get())
    }
}

impl Admission {
    pub fn route(&self) -> &Arc<Route> {
        &self.0
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
        self.0.metrics.active.dec();
    }
}

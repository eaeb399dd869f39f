//! One route as it runs: its upstream, the tier in force, its limit and its figures.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use tracing::{info, warn};

use crate::config::{self, Tier, TierLimit};
use crate::metrics::{Metrics, RouteMetrics};
use crate::throttle::Throttle;
use crate::tier::{Choice, Ladder};
use crate::upstream::Upstream;

/// A route in service.
#[derive(Debug)]
pub struct Route {
    pub name: Arc<str>,
    pub upstream: Arc<Upstream>,
    pub max_connections: u32,
    pub idle_timeout: Option<Duration>,
    /// Keeps "cannot reach the upstream" from filling the log.
    pub unreachable: Throttle,
    pub metrics: RouteMetrics,
    meant: config::Route,
    choice: RwLock<Choice>,
    refused: Throttle,
    active: AtomicU32,
    /// Whether clients may come that the kernel has made ready for a shortcut.
    prepares: AtomicBool,
    /// Whoever makes connections past us: they count for the limit too.
    past_us: OnceLock<PastUs>,
}

/// Told how many connections are ours, tells how many others there are.
struct PastUs(Box<dyn Fn(&AtomicU32) -> u32 + Send + Sync>);

/// A place in a route, given back when dropped.
#[derive(Debug)]
pub struct Admission {
    route: Arc<Route>,
    /// What was in force when it was given.
    pub tier: Tier,
}

impl Route {
    pub fn new(
        meant: &config::Route,
        upstream: Arc<Upstream>,
        ladder: &Ladder,
        metrics: &Metrics,
    ) -> Arc<Self> {
        let choice = ladder.choose(meant, meant.tier);
        let metrics = metrics.route(&meant.name);
        metrics.carried_by(&choice);
        Arc::new(Self {
            name: Arc::clone(&meant.name),
            upstream,
            max_connections: meant.max_connections.get(),
            idle_timeout: meant.idle_timeout,
            unreachable: Throttle::default(),
            metrics,
            meant: meant.clone(),
            choice: RwLock::new(choice),
            refused: Throttle::default(),
            active: AtomicU32::new(0),
            prepares: AtomicBool::new(false),
            past_us: OnceLock::new(),
        })
    }

    /// Has connections counted that do not come to us, by somebody who wants to know of ours. Set once.
    pub fn count_past_us(&self, exchange: impl Fn(&AtomicU32) -> u32 + Send + Sync + 'static) {
        let _ = self.past_us.set(PastUs(Box::new(exchange)));
    }

    /// The tier in force, and why no higher one.
    pub fn choice(&self) -> Choice {
        self.choice.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What carries connections that come to our listeners.
    pub fn relay(&self) -> Tier {
        self.choice.read().unwrap_or_else(PoisonError::into_inner).relay
    }

    /// Keeps new connections to a tier, within what the configuration allows.
    pub fn limit(&self, limit: TierLimit, ladder: &Ladder) {
        let choice = ladder.choose(&self.meant, self.meant.tier.and(limit));
        info!(route = %self.name, tier = %choice.tier, "carried from now on ({})", choice.reason());
        self.metrics.carried_by(&choice);
        *self.choice.write().unwrap_or_else(PoisonError::into_inner) = choice;
    }

    /// Says that from now on the kernel makes clients ready for a shortcut. When it does no more, those
    /// that it has made ready before may still come.
    pub fn prepares_clients(&self) {
        self.prepares.store(true, Ordering::Relaxed);
    }

    /// Whether a client may come that is ready for a shortcut, whatever the tier in force.
    pub fn may_have_prepared(&self) -> bool {
        self.prepares.load(Ordering::Relaxed)
    }

    /// As it was configured.
    pub fn meant(&self) -> &config::Route {
        &self.meant
    }

    /// A place for one more connection, or a refusal that is counted and, now and then, logged.
    pub fn admit(self: &Arc<Self>) -> Option<Admission> {
        let limit = self.max_connections;
        let past_us = self.past_us();
        let place = self.active.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |active| {
            (active.saturating_add(past_us) < limit).then_some(active + 1)
        });
        let tier = self.relay();
        if place.is_err() {
            self.metrics.of(tier).ended("", "refused");
            if let Some(count) = self.refused.say_now() {
                warn!(
                    route = %self.name,
                    refused = count,
                    "refused: {limit} connections are open, which is the route's max_connections"
                );
            }
            return None;
        }
        self.past_us();
        self.metrics.of(tier).active.inc();
        Some(Admission { route: Arc::clone(self), tier })
    }

    /// Connections that are open.
    pub fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed).saturating_add(self.past_us())
    }

    fn past_us(&self) -> u32 {
        self.past_us.get().map_or(0, |PastUs(exchange)| exchange(&self.active))
    }
}

impl Admission {
    pub fn route(&self) -> &Arc<Route> {
        &self.route
    }
}

impl fmt::Debug for PastUs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PastUs")
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.route.active.fetch_sub(1, Ordering::Relaxed);
        self.route.past_us();
        self.route.metrics.of(self.tier).active.dec();
    }
}

//! One route as it runs: its upstream, the tier in force, its limit and its figures.
//!
//! A connection keeps the route that it was accepted with. A changed route is a new one that shares the
//! [`Standing`] of its name with the one before it.

mod standing;

use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tracing::{info, warn};

use crate::config::{self, Tier, TierLimit};
use crate::metrics::RouteMetrics;
use crate::throttle::Throttle;
use crate::tier::{Choice, Ladder};
use crate::upstream::Upstream;
use crate::upstream::circuit::{Circuit, Counts};
use crate::upstream::host::At;
use standing::PastUs;
pub use standing::{Standing, Standings};

/// A route in service.
#[derive(Debug)]
pub struct Route {
    pub name: Arc<str>,
    pub upstream: Arc<Upstream>,
    pub max_connections: u32,
    pub idle_timeout: Option<Duration>,
    /// Keeps "cannot reach the upstream" from filling the log.
    pub unreachable: Throttle,
    pub metrics: Arc<RouteMetrics>,
    meant: config::Route,
    /// What works for it.
    ladder: Arc<Ladder>,
    refused: Throttle,
    standing: Arc<Standing>,
    circuit: Option<Circuit>,
}

/// A place in a route, given back when dropped.
#[derive(Debug)]
pub struct Admission {
    route: Arc<Route>,
    /// What was in force when it was given.
    pub tier: Tier,
    /// Whether it is still on its way.
    pending: AtomicBool,
}

impl Route {
    /// Nothing of it is in force until [`Route::limit`].
    pub fn new(
        meant: &config::Route,
        upstream: Arc<Upstream>,
        ladder: Arc<Ladder>,
        standing: Arc<Standing>,
    ) -> Arc<Self> {
        Arc::new(Self {
            name: Arc::clone(&meant.name),
            upstream,
            max_connections: meant.max_connections.get(),
            idle_timeout: meant.idle_timeout,
            unreachable: Throttle::default(),
            metrics: Arc::clone(&standing.metrics),
            meant: meant.clone(),
            ladder,
            refused: Throttle::default(),
            circuit: Circuit::new(meant.per_endpoint, &standing.held),
            standing,
        })
    }

    /// Whether it is what this configuration would make of it.
    pub fn is(&self, meant: &config::Route, ladder: &Arc<Ladder>) -> bool {
        self.meant == *meant && Arc::ptr_eq(&self.ladder, ladder)
    }

    /// Has connections counted that do not come to us, by somebody who wants to know of ours. Set once.
    pub fn count_past_us(
        &self,
        exchange: impl Fn(&dyn Fn() -> Counts) -> Counts + Send + Sync + 'static,
    ) {
        let _ = self.standing.past_us.set(PastUs(Box::new(exchange)));
        // It may have connections already.
        self.standing.past_us();
    }

    /// The same, by address.
    pub fn count_past_us_by_address(
        &self,
        exchange: impl Fn(&At, Counts) -> Counts + Send + Sync + 'static,
    ) {
        self.standing.held.count_past_us(exchange);
    }

    /// What limits connections to one address.
    pub fn circuit(&self) -> Option<&Circuit> {
        self.circuit.as_ref()
    }

    /// The tier in force, and why no higher one.
    pub fn choice(&self) -> Choice {
        self.standing.choice.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What carries connections that come to our listeners.
    pub fn relay(&self) -> Tier {
        self.standing.choice.read().unwrap_or_else(PoisonError::into_inner).relay
    }

    /// Keeps new connections to a tier, within what the configuration allows.
    pub fn limit(&self, limit: TierLimit) {
        let choice = self.ladder.choose(&self.meant, self.meant.tier.and(limit));
        self.metrics.carried_by(&choice);
        let mut in_force = self.standing.choice.write().unwrap_or_else(PoisonError::into_inner);
        if *in_force != choice {
            info!(route = %self.name, tier = %choice.tier, "carried from now on ({})", choice.reason());
        }
        *in_force = choice;
    }

    /// It is gone, and its connections go on as they are: they take no new shortcuts.
    pub fn retire(&self) {
        let mut in_force = self.standing.choice.write().unwrap_or_else(PoisonError::into_inner);
        in_force.relay = in_force.relay.min(Tier::Splice);
    }

    /// Says that from now on the kernel makes clients ready for a shortcut. When it does no more, those
    /// that it has made ready before may still come.
    pub fn prepares_clients(&self) {
        self.standing.prepares.store(true, Ordering::Relaxed);
    }

    /// Whether a client may come that is ready for a shortcut, whatever the tier in force.
    pub fn may_have_prepared(&self) -> bool {
        self.standing.prepares.load(Ordering::Relaxed)
    }

    /// The highest tier that it may be given.
    pub fn highest(&self) -> Choice {
        self.ladder.choose(&self.meant, self.meant.tier)
    }

    /// As it was configured.
    pub fn meant(&self) -> &config::Route {
        &self.meant
    }

    /// A place for one more connection, or a refusal that is counted and, now and then, logged.
    pub fn admit(self: &Arc<Self>) -> Option<Admission> {
        let (limit, pending) = (self.max_connections, self.meant.max_pending);
        let past_us = self.standing.past_us();
        let is_open = |ours: Counts| ours.and(past_us).active < limit;
        let is_calm = |ours: Counts| pending.is_none_or(|it| ours.and(past_us).pending < it.get());
        let tier = self.relay();
        if !self.standing.take_place(|ours| is_open(ours) && is_calm(ours)) {
            self.metrics.of(tier).ended("", "refused");
            if let Some(count) = self.refused.say_now() {
                let why = match pending {
                    Some(most) if is_open(self.standing.ours()) => format!(
                        "{most} connections are on their way to the upstream, which is the route's \
                         max_pending"
                    ),
                    _ => format!(
                        "{limit} connections are open, which is the route's max_connections"
                    ),
                };
                warn!(route = %self.name, refused = count, "refused: {why}");
            }
            return None;
        }
        self.standing.past_us();
        self.metrics.of(tier).active.inc();
        Some(Admission { route: Arc::clone(self), tier, pending: AtomicBool::new(true) })
    }

    /// Connections that are open.
    pub fn active(&self) -> u32 {
        self.standing.active()
    }
}

impl Admission {
    pub fn route(&self) -> &Arc<Route> {
        &self.route
    }

    /// The upstream is reached.
    pub fn arrived(&self) {
        if self.pending.swap(false, Ordering::Relaxed) {
            self.route.standing.arrived();
            // Else only the next one would say so.
            if self.route.meant.max_pending.is_some() {
                self.route.standing.past_us();
            }
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let standing = &self.route.standing;
        standing.give_back(*self.pending.get_mut());
        standing.past_us();
        standing.metrics.of(self.tier).active.dec();
    }
}

//! The metrics of one route, which outlive its changes and go when it is gone.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use super::{Families, Labels};
use crate::config::Tier;
use crate::tier::{Choice, TIERS};

/// So many endpoints that a route has no more stay counted. More go, so that no label grows without bound
/// where each reload brings other addresses.
const FORMER_ENDPOINTS: usize = 256;

/// The metrics of one route.
#[derive(Debug)]
pub struct RouteMetrics {
    route: String,
    /// By tier, looked up once, when a connection is first carried by it.
    tiers: [OnceLock<TierMetrics>; TIERS.len()],
    connect_seconds: Histogram,
    inflight_bytes: Gauge,
    /// The labels of the tier in force.
    carried: Mutex<Option<Labels>>,
    families: Families,
}

/// The metrics of one tier of a route.
#[derive(Debug)]
pub struct TierMetrics {
    pub active: Gauge,
    up: Counter,
    down: Counter,
    labels: Labels,
    /// By endpoint and outcome.
    ended: Mutex<HashMap<(String, &'static str), Counter>>,
    families: Families,
}

impl RouteMetrics {
    pub(super) fn new(route: &str, families: Families) -> Self {
        let labels = vec![("route", route.to_owned())];
        Self {
            route: route.to_owned(),
            tiers: Default::default(),
            connect_seconds: families.connect_seconds.get_or_create_owned(&labels),
            inflight_bytes: families.inflight_bytes.get_or_create_owned(&labels),
            carried: Mutex::default(),
            families,
        }
    }

    /// Those of one tier.
    pub fn of(&self, tier: Tier) -> &TierMetrics {
        self.tiers[tier as usize].get_or_init(|| {
            let labels = vec![("route", self.route.clone()), ("tier", tier.to_string())];
            let families = self.families.clone();
            let bytes = |way| families.bytes_total.get_or_create_owned(&directed(&labels, way));
            TierMetrics {
                active: families.connections_active.get_or_create_owned(&labels),
                up: bytes("up"),
                down: bytes("down"),
                ended: Mutex::default(),
                families,
                labels,
            }
        })
    }

    /// Those of one tier, if it has ever carried a connection or is in force.
    pub fn known(&self, tier: Tier) -> Option<&TierMetrics> {
        self.tiers[tier as usize].get()
    }

    /// What carries new connections from now on.
    pub fn carried_by(&self, choice: &Choice) {
        // Shown from the start, at zero.
        self.of(choice.tier);
        let labels = vec![
            ("route", self.route.clone()),
            ("tier", choice.tier.to_string()),
            ("reason", choice.reason()),
        ];
        let mut carried = self.carried.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = carried.replace(labels.clone()) {
            self.families.tier_info.remove(&before);
        }
        self.families.tier_info.get_or_create_owned(&labels).set(1);
    }

    /// From a connection's begin to its having reached the upstream.
    pub fn count_connect(&self, took: Duration) {
        self.connect_seconds.observe(took.as_secs_f64());
    }

    /// So much `sockmap` has under way now.
    pub fn has_in_flight(&self, bytes: u64) {
        self.inflight_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Bytes so far, over all tiers, up and down.
    pub fn bytes(&self) -> (u64, u64) {
        let tiers = self.tiers.iter().filter_map(OnceLock::get);
        tiers.fold((0, 0), |(up, down), tier| (up + tier.up.get(), down + tier.down.get()))
    }

    /// Gives up what was counted by endpoints that the route has no more, once those are many.
    pub fn keep_endpoints(&self, is_one: impl Fn(&str) -> bool) {
        for tier in self.tiers.iter().filter_map(OnceLock::get) {
            let mut ended = tier.counters();
            let is_former = |endpoint: &str| !endpoint.is_empty() && !is_one(endpoint);
            if ended.keys().filter(|(endpoint, _)| is_former(endpoint)).count() > FORMER_ENDPOINTS {
                ended.retain(|(endpoint, outcome), _| {
                    let keep = !is_former(endpoint);
                    if !keep {
                        tier.forget_ended(endpoint, outcome);
                    }
                    keep
                });
            }
        }
    }

    /// Takes everything back that was counted for the route: it is no more, nor is any connection of it.
    pub fn forget(&self) {
        let labels = vec![("route", self.route.clone())];
        self.families.connect_seconds.remove(&labels);
        self.families.inflight_bytes.remove(&labels);
        let carried = self.carried.lock().unwrap_or_else(PoisonError::into_inner).take();
        carried.map(|labels| self.families.tier_info.remove(&labels));
        for tier in self.tiers.iter().filter_map(OnceLock::get) {
            self.families.connections_active.remove(&tier.labels);
            for way in ["up", "down"] {
                self.families.bytes_total.remove(&directed(&tier.labels, way));
            }
            for ((endpoint, outcome), _) in tier.counters().drain() {
                tier.forget_ended(&endpoint, outcome);
            }
        }
    }
}

impl TierMetrics {
    pub fn count_bytes(&self, up: u64, down: u64) {
        self.up.inc_by(up);
        self.down.inc_by(down);
    }

    /// Counts a connection that has ended. `endpoint` is empty when none was reached.
    pub fn ended(&self, endpoint: &str, outcome: &'static str) {
        self.counters()
            .entry((endpoint.to_owned(), outcome))
            .or_insert_with(|| {
                let labels = self.ended_labels(endpoint, outcome);
                self.families.connections_total.get_or_create_owned(&labels)
            })
            .inc();
    }

    fn forget_ended(&self, endpoint: &str, outcome: &str) {
        self.families.connections_total.remove(&self.ended_labels(endpoint, outcome));
    }

    fn ended_labels(&self, endpoint: &str, outcome: &str) -> Labels {
        let mut labels = self.labels.clone();
        labels.push(("endpoint", endpoint.to_owned()));
        labels.push(("outcome", outcome.to_owned()));
        labels
    }

    fn counters(&self) -> MutexGuard<'_, HashMap<(String, &'static str), Counter>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn directed(labels: &Labels, way: &str) -> Labels {
    let mut labels = labels.clone();
    labels.push(("direction", way.to_owned()));
    labels
}

//! What is counted, under the names that dashboards use. Labels come from configuration only, so no
//! label grows without bound.

use std::fmt;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::config::Tier;
use crate::process;
use crate::tier::{Choice, TIERS};

type Labels = Vec<(&'static str, String)>;

/// Every metric of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    connections_total: Family<Labels, Counter>,
    connections_active: Family<Labels, Gauge>,
    bytes_total: Family<Labels, Counter>,
    connect_seconds: Family<Labels, Histogram, fn() -> Histogram>,
    inflight_bytes: Family<Labels, Gauge>,
    tier_info: Family<Labels, Gauge>,
    direct_missed_total: Family<Labels, Counter>,
}

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
    connections_total: Family<Labels, Counter>,
    connections_active: Family<Labels, Gauge>,
    bytes_total: Family<Labels, Counter>,
    tier_info: Family<Labels, Gauge>,
}

/// The metrics of one tier of a route.
#[derive(Debug)]
pub struct TierMetrics {
    pub active: Gauge,
    up: Counter,
    down: Counter,
    labels: Labels,
    connections_total: Family<Labels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("ambassador");
        let connections_total = Family::default();
        let connections_active = Family::default();
        let bytes_total = Family::default();
        // 0.1 ms to 6.5 s: from a neighbour on the node to the last of three attempts.
        let connect_seconds = Family::new_with_constructor(
            (|| Histogram::new(exponential_buckets(1e-4, 2.0, 17))) as _,
        );
        let inflight_bytes = Family::default();
        let tier_info = Family::default();
        registry.register(
            "connections",
            "Connections that have ended, by endpoint, tier and outcome",
            connections_total.clone(),
        );
        registry.register("connections_active", "Connections open now", connections_active.clone());
        registry.register("bytes", "Bytes carried, by direction and tier", bytes_total.clone());
        registry.register_with_unit(
            "connect",
            "Time from accepting a connection to having reached its upstream",
            Unit::Seconds,
            connect_seconds.clone(),
        );
        registry.register_with_unit(
            "inflight",
            "What sockmap has passed on in the kernel and upstreams have not acknowledged, at the most",
            Unit::Bytes,
            inflight_bytes.clone(),
        );
        registry.register(
            "tier_info",
            "The tier in force, and why no higher one",
            tier_info.clone(),
        );
        let direct_missed_total = Family::default();
        registry.register(
            "direct_missed",
            "Connections that the connect hooks left to the listeners, by the reason",
            direct_missed_total.clone(),
        );
        registry.register_collector(Box::new(ProcessCollector));
        Self {
            registry,
            connections_total,
            connections_active,
            bytes_total,
            connect_seconds,
            inflight_bytes,
            tier_info,
            direct_missed_total,
        }
    }
}

impl Metrics {
    /// The metrics of a route.
    pub fn route(&self, route: &str) -> RouteMetrics {
        let labels = vec![("route", route.to_owned())];
        RouteMetrics {
            route: route.to_owned(),
            tiers: Default::default(),
            connect_seconds: self.connect_seconds.get_or_create_owned(&labels),
            inflight_bytes: self.inflight_bytes.get_or_create_owned(&labels),
            carried: Mutex::default(),
            connections_total: self.connections_total.clone(),
            connections_active: self.connections_active.clone(),
            bytes_total: self.bytes_total.clone(),
            tier_info: self.tier_info.clone(),
        }
    }

    /// Counts connections that the connect hooks left to the listeners for this reason.
    pub fn direct_missed(&self, reason: &str) -> Counter {
        self.direct_missed_total.get_or_create_owned(&vec![("reason", reason.to_owned())])
    }

    /// The OpenMetrics text.
    pub fn render(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl RouteMetrics {
    /// Those of one tier.
    pub fn of(&self, tier: Tier) -> &TierMetrics {
        self.tiers[tier as usize].get_or_init(|| {
            let labels = vec![("route", self.route.clone()), ("tier", tier.to_string())];
            let bytes = |direction: &str| {
                let mut labels = labels.clone();
                labels.push(("direction", direction.to_owned()));
                self.bytes_total.get_or_create_owned(&labels)
            };
            TierMetrics {
                active: self.connections_active.get_or_create_owned(&labels),
                up: bytes("up"),
                down: bytes("down"),
                connections_total: self.connections_total.clone(),
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
            self.tier_info.remove(&before);
        }
        self.tier_info.get_or_create_owned(&labels).set(1);
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
}

impl TierMetrics {
    pub fn count_bytes(&self, up: u64, down: u64) {
        self.up.inc_by(up);
        self.down.inc_by(down);
    }

    /// Counts a connection that has ended. `endpoint` is empty when none was reached.
    pub fn ended(&self, endpoint: &str, outcome: &str) {
        let mut labels = self.labels.clone();
        labels.push(("endpoint", endpoint.to_owned()));
        labels.push(("outcome", outcome.to_owned()));
        self.connections_total.get_or_create(&labels).inc();
    }
}

/// Reads the process's own figures at each scrape.
#[derive(Debug)]
struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        // Without /proc there is nothing to tell.
        let Ok(figures) = process::Figures::now() else { return Ok(()) };
        let cpu = ConstCounter::new(figures.cpu_seconds);
        cpu.encode(encoder.encode_descriptor(
            "process_cpu",
            "User and system time spent",
            Some(&Unit::Seconds),
            prometheus_client::metrics::MetricType::Counter,
        )?)?;
        let gauges = [
            (
                "process_resident_memory",
                "Memory in RAM",
                Some(&Unit::Bytes),
                figures.resident_bytes,
            ),
            ("process_open_fds", "Open file descriptors", None, figures.open_fds),
            ("process_max_fds", "Most file descriptors allowed", None, figures.max_fds),
        ];
        for (name, help, unit, value) in gauges {
            let metric = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            metric.encode(encoder.encode_descriptor(
                name,
                help,
                unit,
                prometheus_client::metrics::MetricType::Gauge,
            )?)?;
        }
        Ok(())
    }
}

//! What is counted, under the names that dashboards use. Labels come from configuration only, and those of
//! routes that are gone go too, so no label grows without bound.

mod endpoints;
mod route;

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::config::Tier;
use crate::datapath::selftest::{Found, Outcome};
use crate::process;
use crate::upstream::Upstream;
use endpoints::Endpoints;
pub use route::{RouteMetrics, TierMetrics};

type Labels = Vec<(&'static str, String)>;

/// Every metric of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    families: Families,
    direct_missed_total: Family<Labels, Counter>,
    config_reloads_total: Family<Labels, Counter>,
    selftest_result: Family<Labels, Gauge>,
    endpoints: Endpoints,
}

/// Those that routes have a share in.
#[derive(Debug, Clone)]
struct Families {
    connections_total: Family<Labels, Counter>,
    connections_active: Family<Labels, Gauge>,
    bytes_total: Family<Labels, Counter>,
    connect_seconds: Family<Labels, Histogram, fn() -> Histogram>,
    inflight_bytes: Family<Labels, Gauge>,
    tier_info: Family<Labels, Gauge>,
}

impl Default for Families {
    fn default() -> Self {
        Self {
            connections_total: Family::default(),
            connections_active: Family::default(),
            bytes_total: Family::default(),
            // 0.1 ms to 6.5 s: from a neighbour on the node to the last of three attempts.
            connect_seconds: Family::new_with_constructor(
                (|| Histogram::new(exponential_buckets(1e-4, 2.0, 17))) as _,
            ),
            inflight_bytes: Family::default(),
            tier_info: Family::default(),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("ambassador");
        let families = Families::default();
        registry.register(
            "connections",
            "Connections that have ended, by endpoint, tier and outcome",
            families.connections_total.clone(),
        );
        registry.register(
            "connections_active",
            "Connections open now",
            families.connections_active.clone(),
        );
        registry.register(
            "bytes",
            "Bytes carried, by direction and tier",
            families.bytes_total.clone(),
        );
        registry.register_with_unit(
            "connect",
            "Time from accepting a connection to having reached its upstream",
            Unit::Seconds,
            families.connect_seconds.clone(),
        );
        registry.register_with_unit(
            "inflight",
            "What sockmap has passed on in the kernel and upstreams have not acknowledged, at the most",
            Unit::Bytes,
            families.inflight_bytes.clone(),
        );
        registry.register(
            "tier_info",
            "The tier in force, and why no higher one",
            families.tier_info.clone(),
        );
        let direct_missed_total = Family::default();
        registry.register(
            "direct_missed",
            "Connections that the connect hooks left to the listeners, by the reason",
            direct_missed_total.clone(),
        );
        let config_reloads_total = Family::<Labels, Counter>::default();
        registry.register(
            "config_reloads",
            "Times that the configuration was read again, by the result",
            config_reloads_total.clone(),
        );
        // Shown from the start, at zero.
        for result in ["ok", "refused", "unchanged"] {
            config_reloads_total.get_or_create_owned(&vec![("result", result.to_owned())]);
        }
        let selftest_result = Family::default();
        registry.register(
            "selftest_result",
            "Whether the kernel tiers did what they have to when they were tried at the start",
            selftest_result.clone(),
        );
        let endpoints = Endpoints::default();
        registry.register_collector(Box::new(endpoints.clone()));
        registry.register_collector(Box::new(ProcessCollector));
        Self {
            registry,
            families,
            direct_missed_total,
            config_reloads_total,
            selftest_result,
            endpoints,
        }
    }
}

impl Metrics {
    /// The metrics of a route.
    pub fn route(&self, route: &str) -> RouteMetrics {
        RouteMetrics::new(route, self.families.clone())
    }

    /// Counts connections that the connect hooks left to the listeners for this reason.
    pub fn direct_missed(&self, reason: &str) -> Counter {
        self.direct_missed_total.get_or_create_owned(&vec![("reason", reason.to_owned())])
    }

    /// Counts a reload that came out so.
    pub fn reloaded(&self, result: &str) {
        self.config_reloads_total.get_or_create(&vec![("result", result.to_owned())]).inc();
    }

    /// Shows what was found when the kernel tiers were tried.
    pub fn self_test(&self, found: &Found) {
        for (tier, tried) in [(Tier::Direct, &found.direct), (Tier::Sockmap, &found.sockmap)] {
            for check in tried.iter().flatten() {
                let passed = match check.outcome {
                    Outcome::Passed => 1,
                    Outcome::Failed(_) => 0,
                    Outcome::Skipped(_) => continue,
                };
                let labels = vec![("tier", tier.to_string()), ("check", check.name.to_owned())];
                self.selftest_result.get_or_create(&labels).set(passed);
            }
        }
    }

    /// Shows the endpoints of these as they are now.
    pub fn endpoints_of<'u>(&self, upstreams: impl Iterator<Item = &'u Upstream>) {
        self.endpoints.are(upstreams);
    }

    /// The OpenMetrics text.
    pub fn render(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
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

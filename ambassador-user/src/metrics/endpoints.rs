//! How endpoints are, as it was when the figures were last brought up to date.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::upstream::Upstream;

/// Shown whole, replaced whole.
#[derive(Debug, Clone, Default)]
pub(super) struct Endpoints(Arc<Mutex<Vec<Figures>>>);

#[derive(Debug)]
struct Figures {
    labels: [(&'static str, String); 2],
    healthy: bool,
    ejections: u64,
}

impl Endpoints {
    pub(super) fn are<'u>(&self, upstreams: impl Iterator<Item = &'u Upstream>) {
        let figures = upstreams.flat_map(|upstream| {
            upstream.endpoints().iter().map(|endpoint| Figures {
                labels: [
                    ("upstream", upstream.name.to_string()),
                    ("endpoint", endpoint.label().to_string()),
                ],
                healthy: endpoint.is_good(),
                ejections: endpoint.ejections(),
            })
        });
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = figures.collect();
    }
}

impl Collector for Endpoints {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let help = "Whether connections may go there: 1 or 0";
        let mut healthy =
            encoder.encode_descriptor("endpoint_healthy", help, None, MetricType::Gauge)?;
        for Figures { labels, healthy: is_healthy, .. } in &*all {
            ConstGauge::new(i64::from(*is_healthy)).encode(healthy.encode_family(labels)?)?;
        }
        let help = "Times that one of its addresses was taken out because connections failed";
        let mut ejections =
            encoder.encode_descriptor("endpoint_ejections", help, None, MetricType::Counter)?;
        for Figures { labels, ejections: count, .. } in &*all {
            ConstCounter::new(*count).encode(ejections.encode_family(labels)?)?;
        }
        Ok(())
    }
}

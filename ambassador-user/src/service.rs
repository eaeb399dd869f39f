//! The running ambassador, as probes, metrics and the control socket see it.

use std::sync::Arc;
use std::time::Instant;

use crate::config;
use crate::drain::{Drain, Phase};
use crate::metrics::Metrics;
use crate::proxy::connection::Connections;
use crate::route::Route;

/// What is in service.
#[derive(Debug)]
pub struct Service {
    /// Each route as it runs and as it was meant.
    pub routes: Vec<(Arc<Route>, config::Route)>,
    pub connections: Arc<Connections>,
    pub metrics: Metrics,
    pub drain: Drain,
    pub started: Instant,
}

/// What people ask of it over the control socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Drain,
    Shutdown,
}

impl Service {
    /// Bound, configured, and not about to end.
    pub fn ready(&self) -> bool {
        self.drain.phase() == Phase::Serving
    }
}

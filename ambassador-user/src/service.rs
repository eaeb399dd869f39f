//! The running ambassador, as probes, metrics and the control socket see it.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::config::{Tier, TierLimit};
use crate::datapath::sockmap::{Enrol, Sockmap};
use crate::direct::Direct;
use crate::direct::plan::loopback;
use crate::drain::{Drain, Phase};
use crate::metrics::Metrics;
use crate::proxy::connection::Connections;
use crate::route::Route;
use crate::tier::Ladder;

/// What is in service.
pub struct Service {
    pub routes: Vec<Arc<Route>>,
    pub ladder: Ladder,
    /// The tables of the routes that are carried by `direct`, if any can be.
    pub direct: Option<Arc<Direct>>,
    /// The way past us for routes that are relayed by `sockmap`, if there is one.
    pub sockmap: Option<Arc<Sockmap>>,
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
    /// Keeps new connections of a route, or of `all`, to a tier. Connections that are open stay, but
    /// shortcuts that the tier does not allow close.
    pub fn limit(&self, name: &str, limit: TierLimit) -> Result<()> {
        let meant = |route: &&Arc<Route>| name == "all" || *route.name == *name;
        let mut routes = self.routes.iter().filter(meant).peekable();
        ensure!(
            routes.peek().is_some(),
            "there is no route {name:?}; there are {}",
            self.routes.iter().map(|route| &*route.name).collect::<Vec<_>>().join(", ")
        );
        routes.for_each(|route| route.limit(limit, &self.ladder));
        if let Some(direct) = &self.direct {
            direct.update();
        }
        self.enrol()?;
        self.connections.close_shortcuts(|route| route.relay() != Tier::Sockmap);
        Ok(())
    }

    /// Has clients enrolled for the routes that are relayed by `sockmap`, and for no others.
    pub fn enrol(&self) -> Result<()> {
        let Some(sockmap) = &self.sockmap else { return Ok(()) };
        for route in &self.routes {
            let whom = match route.relay() {
                Tier::Sockmap if route.meant().tier == TierLimit::AtMost(Tier::Sockmap) => {
                    Enrol::Anybody
                }
                // Where somebody vouches for all clients, too: one that blocks all the same is left alone.
                Tier::Sockmap => Enrol::Unnoticed,
                _ => Enrol::Nobody,
            };
            if whom != Enrol::Nobody {
                route.prepares_clients();
            }
            for address in route.meant().listen.iter().flat_map(loopback) {
                sockmap.enrol(address, whom).with_context(|| format!("route {}", route.name))?;
            }
        }
        Ok(())
    }

    /// Brings all figures up to date.
    pub async fn settle(&self) {
        self.connections.settle();
        let in_flight = self.connections.in_flight();
        for route in &self.routes {
            route.metrics.has_in_flight(in_flight.get(&route.name).copied().unwrap_or(0));
        }
        if let Some(direct) = self.direct.clone() {
            // It asks the kernel for all sockets, which is not for a thread of the runtime.
            let _ = tokio::task::spawn_blocking(move || direct.settle()).await;
        }
    }

    /// Bound, configured, and not about to end.
    pub fn ready(&self) -> bool {
        self.drain.phase() == Phase::Serving
    }
}

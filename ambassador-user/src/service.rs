//! The running ambassador, as probes, metrics and the control socket see it.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::info;

use crate::config::{ReadyWhen, Tier, TierLimit};
use crate::datapath::sockmap::{Enrol, Sockmap};
use crate::direct::Direct;
use crate::direct::plan::loopback;
use crate::drain::{Drain, Phase};
use crate::metrics::Metrics;
use crate::proxy::connection::Connections;
use crate::reload::Loaded;
use crate::route::{Route, Standings};
use crate::upstream::Upstream;

/// Between two looks at connections to hosts that are lost.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// What is in service.
pub struct Service {
    routes: RwLock<Arc<[Arc<Route>]>>,
    pub standings: Standings,
    limits: Mutex<Limits>,
    /// The tables of the routes that are carried by `direct`, if any can be.
    pub direct: Option<Arc<Direct>>,
    /// The way past us for routes that are relayed by `sockmap`, if there is one.
    pub sockmap: Option<Arc<Sockmap>>,
    enrolled: Mutex<HashMap<SocketAddr, Enrol>>,
    pub connections: Arc<Connections>,
    pub metrics: Metrics,
    pub drain: Drain,
    ready_when: ReadyWhen,
    pub started: Instant,
    /// What is told of the configuration.
    pub loaded: Mutex<Loaded>,
}

/// What people ask of it over the control socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Drain,
    Shutdown,
}

/// The tiers that people keep routes to. A reload does not undo that.
#[derive(Debug, Default)]
struct Limits {
    all: TierLimit,
    /// Of those that were told apart since.
    routes: HashMap<Arc<str>, TierLimit>,
}

impl Service {
    /// With no route yet.
    pub fn new(
        direct: Option<Arc<Direct>>,
        sockmap: Option<Arc<Sockmap>>,
        metrics: Metrics,
        drain: Drain,
        ready_when: ReadyWhen,
        loaded: Loaded,
    ) -> Self {
        Self {
            routes: RwLock::new(Arc::new([])),
            standings: Standings::default(),
            limits: Mutex::default(),
            direct,
            sockmap,
            enrolled: Mutex::default(),
            connections: Arc::default(),
            metrics,
            drain,
            ready_when,
            started: Instant::now(),
            loaded: Mutex::new(loaded),
        }
    }

    pub fn routes(&self) -> Arc<[Arc<Route>]> {
        Arc::clone(&self.routes.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the routes; what carries them is up to [`Service::follow`].
    pub fn replace(&self, routes: Arc<[Arc<Route>]>) {
        let names: HashSet<_> = routes.iter().map(|route| Arc::clone(&route.name)).collect();
        let mut limits = self.limits();
        limits.routes.retain(|name, _| names.contains(name));
        routes.iter().for_each(|route| route.limit(limits.of(&route.name)));
        let mut in_force = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *in_force, routes);
        before.iter().filter(|route| !names.contains(&route.name)).for_each(|route| route.retire());
    }

    /// Has the kernel carry the routes as they are now. It may have to wait for the kernel.
    pub fn follow(&self) -> Result<()> {
        if let Some(direct) = &self.direct {
            direct.change(&self.routes()).context("change the kernel's tables")?;
        }
        self.enrol()
    }

    /// Keeps new connections of a route, or of `all`, to a tier. Connections that are open stay, but
    /// shortcuts that the tier does not allow close.
    pub fn limit(&self, name: &str, limit: TierLimit) -> Result<()> {
        let routes = self.routes();
        let meant = |route: &&Arc<Route>| name == "all" || *route.name == *name;
        let mut limited = routes.iter().filter(meant).peekable();
        ensure!(
            limited.peek().is_some(),
            "there is no route {name:?}; there are {}",
            routes.iter().map(|route| &*route.name).collect::<Vec<_>>().join(", ")
        );
        {
            let mut limits = self.limits();
            if name == "all" {
                *limits = Limits { all: limit, routes: HashMap::new() };
            } else {
                limits.routes.insert(name.into(), limit);
            }
            limited.for_each(|route| route.limit(limit));
        }
        if let Some(direct) = &self.direct {
            direct.update();
        }
        self.enrol()?;
        self.connections.close_shortcuts(|route| route.relay() != Tier::Sockmap);
        Ok(())
    }

    /// Has clients enrolled for the routes that are relayed by `sockmap`, and for no others.
    fn enrol(&self) -> Result<()> {
        let Some(sockmap) = &self.sockmap else { return Ok(()) };
        let mut wanted = HashMap::new();
        for route in self.routes().iter().filter(|route| route.relay() == Tier::Sockmap) {
            let whom = match route.meant().tier {
                TierLimit::AtMost(Tier::Sockmap) => Enrol::Anybody,
                // Where somebody vouches for all clients, too: one that blocks all the same is left alone.
                _ => Enrol::Unnoticed,
            };
            route.prepares_clients();
            wanted.extend(route.meant().listen.iter().flat_map(loopback).map(|it| (it, whom)));
        }
        let mut enrolled = self.enrolled.lock().unwrap_or_else(PoisonError::into_inner);
        for (address, _) in enrolled.extract_if(|address, _| !wanted.contains_key(address)) {
            sockmap.enrol(address, Enrol::Nobody)?;
        }
        for (address, whom) in wanted {
            if enrolled.get(&address) != Some(&whom) {
                sockmap.enrol(address, whom).with_context(|| format!("at {address}"))?;
                enrolled.insert(address, whom);
            }
        }
        Ok(())
    }

    /// Puts in force what becomes known of hosts: where they are, and whether they are good.
    pub async fn follow_hosts(self: Arc<Self>, mut changes: watch::Receiver<()>) {
        loop {
            tokio::select! {
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                // One that was on its way when others were ended may have arrived.
                () = sleep(LOOK_AGAIN), if self.may_have_lost() => {}
            }
            // First, so that whoever is sent away does not come back to the same host.
            if let Some(direct) = self.direct.clone() {
                let follow = move || {
                    direct.update();
                    direct.leave_lost_hosts();
                };
                // It may have many tables to write, which is not for a thread of the runtime.
                let _ = tokio::task::spawn_blocking(follow).await;
            }
            let lost = self.connections.leave_lost_hosts();
            if lost > 0 {
                info!(connections = lost, "reset: they lead to hosts that are lost");
            }
        }
    }

    /// Whether connections may have to be ended because of their hosts.
    fn may_have_lost(&self) -> bool {
        let is_bad = |upstream: &Upstream| upstream.hosts().iter().any(|host| !host.is_good());
        let routes = self.routes();
        let mut upstreams = routes.iter().map(|route| &*route.upstream);
        upstreams.any(|it| it.meant().closes_unhealthy() && is_bad(it))
    }

    /// Brings all figures up to date.
    pub async fn settle(&self) {
        self.connections.settle();
        let in_flight = self.connections.in_flight();
        for route in self.routes().iter() {
            route.metrics.has_in_flight(in_flight.get(&route.name).copied().unwrap_or(0));
        }
        if let Some(direct) = self.direct.clone() {
            // It asks the kernel for all sockets, which is not for a thread of the runtime.
            let _ = tokio::task::spawn_blocking(move || direct.settle()).await;
        }
        let routes = self.routes();
        let mut told = HashSet::new();
        let upstreams = routes.iter().map(|route| &*route.upstream);
        self.metrics.endpoints_of(upstreams.filter(|it| told.insert(Arc::clone(&it.name))));
        self.standings.sweep();
    }

    /// Why it is not ready; nothing if it is: bound, configured, and not about to end.
    pub fn not_ready(&self) -> Option<String> {
        if self.drain.phase() != Phase::Serving {
            return Some("draining".to_owned());
        }
        if self.ready_when == ReadyWhen::Bound {
            return None;
        }
        let routes = self.routes();
        let without = routes.iter().filter(|route| !route.upstream.is_known_healthy());
        let without: Vec<_> = without.map(|route| &*route.name).collect();
        (!without.is_empty()).then(|| format!("no healthy endpoint for {}", without.join(", ")))
    }

    fn limits(&self) -> MutexGuard<'_, Limits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Limits {
    fn of(&self, route: &str) -> TierLimit {
        self.routes.get(route).copied().unwrap_or(self.all)
    }
}

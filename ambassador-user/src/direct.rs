//! The `direct` tier in service: keeps the kernel's tables true, and tells what the kernel did with them.

pub(crate) mod plan;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tracing::{debug, info, warn};

use crate::config::Tier;
use crate::datapath::tables::{
    self, End, Ends, Flow, IN_ORDER, MISS_REASONS, NEVER_ESTABLISHED, Plan, Tables, from_kernel,
    route_id,
};
use crate::metrics::Metrics;
use crate::proxy::connection::Outcome;
use crate::route::Route;
use crate::sockets;
use crate::throttle::Throttle;
use crate::upstream::{Endpoint, Upstream};

/// Signs of life before the tables would be taken for stale.
const RENEWALS: u32 = 4;

/// How long ends are gathered before they are written down. The ring holds more than a node's worth of
/// them.
const GATHER: Duration = Duration::from_millis(50);

/// Why the connect hooks leave a connection to a listener, as metrics name it.
const MISSES: [&str; MISS_REASONS as usize] = ["bound", "no_target", "no_room"];

/// The tables of all routes, and what is known of the connections they made.
pub struct Direct {
    state: Mutex<State>,
    /// By their ids.
    routes: HashMap<u64, (u32, Arc<Route>)>,
    stale_after: Option<Duration>,
    unreachable: Throttle,
    /// By [`MISSES`].
    missed: [Counter; MISSES.len()],
}

struct State {
    tables: Tables,
    /// What is in force, by route.
    plans: HashMap<u32, Plan>,
    /// Addresses that no plan names any more, but connections to them may be open.
    retired: Vec<(u64, SocketAddr)>,
    /// Bytes of open connections that are in the counters already, by cookie.
    settled: HashMap<u64, (u64, u64)>,
    /// Misses that are in the counters already.
    missed: [u64; MISSES.len()],
    /// Ends that the kernel told nobody, of which we have told.
    untold: u64,
}

/// A connection that is open, made by the kernel.
pub struct OpenConnection {
    pub cookie: u64,
    pub route: Arc<str>,
    pub peer: SocketAddr,
    pub endpoint: Arc<str>,
    pub bytes: (u64, u64),
    pub age: Duration,
}

impl Direct {
    /// Takes over the tables for these routes, of which those are put in force that are carried so; and
    /// keeps them true until the process ends.
    pub fn start(
        mut tables: Tables,
        ends: Ends,
        routes: &[Arc<Route>],
        changes: watch::Receiver<()>,
        stale_after: Option<Duration>,
        metrics: &Metrics,
    ) -> Result<Arc<Self>> {
        let indexed = || (0..).zip(routes);
        let listeners: Vec<_> = indexed()
            .flat_map(|(index, route)| {
                let addresses = route.meant().listen.iter().flat_map(plan::loopback);
                addresses.map(move |address| (address, index))
            })
            .collect();
        tables.listen(&listeners)?;
        // All this may have begun under an ambassador before this one, whose counters have it.
        let open = tables.open();
        let live = if open.is_empty() { HashMap::new() } else { live_figures() };
        let settled = open.iter().filter_map(|(cookie, _)| live.get_key_value(cookie));
        let untold = routes.iter().map(|route| tables.untold(route_id(&route.name))).sum();
        if untold > 0 {
            info!("{untold} connections ended without a record since the kernel half was loaded");
        }
        let state = State {
            retired: tables.targets(),
            missed: tables.missed(),
            settled: settled.map(|(cookie, bytes)| (*cookie, *bytes)).collect(),
            untold,
            tables,
            plans: HashMap::new(),
        };
        let direct = Arc::new(Self {
            state: Mutex::new(state),
            routes: indexed()
                .map(|(index, route)| (route_id(&route.name), (index, Arc::clone(route))))
                .collect(),
            stale_after,
            unreachable: Throttle::default(),
            missed: MISSES.map(|reason| metrics.direct_missed(reason)),
        });
        direct.update();
        direct.state().tables.renew(stale_after)?;
        for (index, route) in indexed() {
            let id = route_id(&route.name);
            // Where nothing is, was or will be carried past us, counting would only cost every connection.
            if route.choice().tier < Tier::Direct && direct.active(id) == 0 {
                continue;
            }
            let direct = Arc::downgrade(&direct);
            route.count_past_us(move |ours| {
                direct.upgrade().map_or(0, |direct| direct.exchange_counts(index, id, ours))
            });
        }
        tokio::spawn(Arc::clone(&direct).keep_true(changes));
        tokio::spawn(Arc::clone(&direct).record(ends));
        Ok(direct)
    }

    /// Puts in force what is true now: tiers and addresses.
    pub fn update(&self) {
        let mut state = self.state();
        for (id, (index, route)) in &self.routes {
            let plan = (route.choice().tier == Tier::Direct)
                .then(|| plan::of(*id, route))
                .filter(|plan| !plan.targets.is_empty());
            if state.plans.get(index) == plan.as_ref() {
                continue;
            }
            let written = match &plan {
                Some(plan) => state.tables.put(*index, plan),
                None => state.tables.withdraw(*index),
            };
            let before = match (written, plan) {
                (Ok(()), Some(plan)) => state.plans.insert(*index, plan),
                (Ok(()), None) => state.plans.remove(index),
                (Err(error), _) => {
                    warn!(route = %route.name, "cannot change its table: {error:#}");
                    None
                }
            };
            let addresses = before.into_iter().flat_map(|plan| plan.targets);
            state.retired.extend(addresses.map(|(address, _)| (*id, address)));
        }
    }

    /// Nothing is redirected any more; connections that are open stay.
    pub fn close(&self) -> Result<()> {
        self.state().tables.close()
    }

    /// Keeps the tables true and fresh.
    async fn keep_true(self: Arc<Self>, mut changes: watch::Receiver<()>) {
        let every = self.stale_after.map_or(Duration::from_secs(60), |time| time / RENEWALS);
        let mut renewal = interval(every);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = renewal.tick() => {
                    let mut state = self.state();
                    if let Err(error) = state.tables.renew_if_open(self.stale_after) {
                        warn!("cannot keep the kernel's tables fresh: {error:#}");
                    }
                    state.forget_retired();
                }
                // Without any name there is nothing that could change.
                Ok(()) = changes.changed() => self.update(),
            }
        }
    }

    /// Tells the kernel how many connections of a route are carried here, and gets how many are not.
    fn exchange_counts(&self, index: u32, route: u64, ours: &AtomicU32) -> u32 {
        let mut state = self.state();
        // Read while nobody else tells it, so that the newest number is told last.
        if let Err(error) = state.tables.carry(index, ours.load(Ordering::Relaxed)) {
            debug!("connections of both ways may exceed max_connections: {error:#}");
        }
        drop(state);
        self.active(route)
    }

    /// Connections of a route to an endpoint that are open.
    pub fn reached(&self, route: &str, endpoint: &Endpoint) -> u32 {
        let state = self.state();
        let targets = endpoint.addresses().into_iter();
        let counted = targets.filter_map(|it| state.tables.target(route_id(route), it).ok());
        counted.map(|target| u32::try_from(target.active).unwrap_or(u32::MAX)).sum()
    }

    /// Connections of a route that are open.
    fn active(&self, route: u64) -> u32 {
        let counted = self.state().tables.route(route);
        counted.map_or(0, |counted| u32::try_from(counted.active).unwrap_or(u32::MAX))
    }

    /// Connections that are open, oldest first. Takes time by the number of sockets there are.
    pub fn open(&self) -> Vec<OpenConnection> {
        let now = tables::now().unwrap_or(0);
        let live = live_figures();
        let mut open = self.state().tables.open();
        open.sort_unstable_by_key(|(_, flow)| flow.started);
        let known = open.into_iter().filter_map(|(cookie, flow)| {
            let (_, route) = self.routes.get(&flow.key.route)?;
            Some(OpenConnection {
                cookie,
                route: Arc::clone(&route.name),
                peer: from_kernel(flow.local),
                endpoint: label(&route.upstream, &flow),
                bytes: live.get(&cookie).copied().unwrap_or_default(),
                age: Duration::from_nanos(now.saturating_sub(flow.started)),
            })
        });
        known.collect()
    }

    /// Brings the routes' figures up to date with connections that are open. Takes time by the number of
    /// sockets there are.
    pub fn settle(&self) {
        for (id, (_, route)) in &self.routes {
            if let Some(metrics) = route.metrics.known(Tier::Direct) {
                metrics.active.set(self.active(*id).into());
            }
        }
        self.settle_missed();
        let live = live_figures();
        // Held throughout: an end must not be counted between a look at what is open and the count.
        let mut state = self.state();
        for (cookie, flow) in state.tables.open() {
            let (Some((_, route)), Some(&(up, down))) =
                (self.routes.get(&flow.key.route), live.get(&cookie))
            else {
                continue;
            };
            let settled = state.settled.entry(cookie).or_default();
            let more = (up.saturating_sub(settled.0), down.saturating_sub(settled.1));
            route.metrics.of(Tier::Direct).count_bytes(more.0, more.1);
            *settled = (settled.0 + more.0, settled.1 + more.1);
        }
    }

    /// Connections that the hooks left to the listeners so far, by the reason.
    pub fn missed(&self) -> impl Iterator<Item = (&'static str, u64)> {
        MISSES.into_iter().zip(self.state().tables.missed())
    }

    fn settle_missed(&self) {
        let mut state = self.state();
        let now = state.tables.missed();
        let before = std::mem::replace(&mut state.missed, now);
        for ((counter, now), before) in self.missed.iter().zip(now).zip(before) {
            counter.inc_by(now.saturating_sub(before));
        }
        if now.last() > before.last() {
            warn!("a map of the kernel half is full: connections go to the listeners instead");
        }
    }

    /// Writes the records of connections as they end.
    async fn record(self: Arc<Self>, ends: Ends) -> io::Result<()> {
        let mut ends = ends.register()?;
        loop {
            let mut guard = ends.readable_mut().await?;
            // The kernel wakes us for the first of them, and not again while it waits: so many that end
            // at once cost one wake-up.
            sleep(GATHER).await;
            while let Some(end) = guard.get_inner_mut().next() {
                self.record_one(&end);
            }
            guard.clear_ready();
            self.tell_of_untold();
        }
    }

    fn record_one(&self, end: &End) {
        let flow = &end.flow;
        // Of an ambassador before this one, with other routes.
        let Some((_, route)) = self.routes.get(&flow.key.route) else { return };
        let endpoint = label(&route.upstream, flow);
        let outcome = match end.outcome {
            IN_ORDER => Outcome::Ok,
            NEVER_ESTABLISHED => Outcome::ConnectFailed,
            _ => Outcome::Reset,
        };
        let settled = self.state().settled.remove(&end.cookie).unwrap_or_default();
        let metrics = route.metrics.of(Tier::Direct);
        metrics.count_bytes(
            end.bytes_up.saturating_sub(settled.0),
            end.bytes_down.saturating_sub(settled.1),
        );
        metrics.ended(&endpoint, outcome.name());
        let connect = Duration::from_nanos(flow.established.saturating_sub(flow.started));
        if outcome == Outcome::ConnectFailed {
            if let Some(failed) = self.unreachable.say_now() {
                let address = from_kernel(flow.key.address);
                warn!(route = %route.name, failed, "an app could not reach {endpoint} ({address})");
            }
        } else {
            route.metrics.count_connect(connect);
        }
        info!(
            target: "access",
            route = %route.name,
            peer = %from_kernel(flow.local),
            endpoint = %endpoint,
            tier = %Tier::Direct,
            outcome = outcome.name(),
            bytes_up = end.bytes_up,
            bytes_down = end.bytes_down,
            duration_ms = millis(end.ended.saturating_sub(flow.started)),
            connect_ms = connect.as_secs_f64() * 1e3,
            rtt_us = end.rtt_us,
            retransmits = end.retransmits,
            "connection"
        );
    }

    /// The kernel tells nobody while its ring is full, but counts them.
    fn tell_of_untold(&self) {
        let mut state = self.state();
        let untold = self.routes.keys().map(|id| state.tables.untold(*id)).sum();
        let before = std::mem::replace(&mut state.untold, untold);
        if untold > before {
            warn!(
                "{} connections ended without a record: there were too many at once",
                untold - before
            );
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Makes room in the kernel for addresses to come.
    fn forget_retired(&mut self) {
        let Self { tables, plans, retired, .. } = self;
        retired.retain(|&(route, address)| {
            let names_it = |plan: &Plan| {
                plan.route == route && plan.targets.iter().any(|(target, _)| *target == address)
            };
            // Named again, it is retired once more when that ends.
            let gone =
                plans.values().any(names_it) || tables.forget(route, address).unwrap_or(true);
            !gone
        });
    }
}

/// The endpoint that an address belongs to, as the user wrote it; or the address, when it no longer
/// belongs to any.
fn label(upstream: &Upstream, flow: &Flow) -> Arc<str> {
    let address = from_kernel(flow.key.address);
    let endpoint = upstream.endpoints().iter().find(|it| it.addresses().contains(&address));
    endpoint.map_or_else(|| address.to_string().into(), |endpoint| Arc::clone(endpoint.label()))
}

/// Bytes up and down of this namespace's connections, by cookie.
fn live_figures() -> HashMap<u64, (u64, u64)> {
    let mut live = HashMap::new();
    let asked = sockets::each_connection(|it| {
        live.insert(it.cookie, it.opener_bytes());
    });
    if let Err(error) = asked {
        debug!("bytes of open connections are counted when they end: {error:#}");
    }
    live
}

fn millis(nanoseconds: u64) -> f64 {
    Duration::from_nanos(nanoseconds).as_secs_f64() * 1e3
}

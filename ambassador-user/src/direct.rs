//! The `direct` tier in service: keeps the kernel's tables true, for routes that come, change and go.

pub(crate) mod plan;

mod records;
mod retired;
mod slots;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use prometheus_client::metrics::counter::Counter;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{debug, info, warn};

use crate::config::Tier;
use crate::datapath::tables::{self, Carried, Ends, MISS_REASONS, Plan, Tables, Target, route_id};
use crate::metrics::Metrics;
use crate::route::Route;
use crate::sockets::destroy::Destroyer;
use crate::throttle::Throttle;
use crate::upstream::Endpoint;
use crate::upstream::circuit::Counts;
use crate::upstream::host::At;
pub use records::OpenConnection;
use records::live_figures;
use retired::Retired;
use slots::Slots;

/// Signs of life before the tables would be taken for stale.
const RENEWALS: u32 = 4;

/// When the end of a connection is told for certain.
const TOLD: Duration = Duration::from_secs(1);

/// Why the connect hooks leave a connection to a listener, as metrics name it.
const MISSES: [&str; MISS_REASONS as usize] = ["bound", "no_target", "no_room"];

/// The tables of all routes, and what is known of the connections they made.
pub struct Direct {
    state: Mutex<State>,
    stale_after: Option<Duration>,
    destroyer: Option<Destroyer>,
    unreachable: Throttle,
    /// By [`MISSES`].
    missed: [Counter; MISSES.len()],
}

struct State {
    tables: Tables,
    /// By their ids.
    routes: HashMap<u64, Arc<Route>>,
    /// Those that are no more, but may have connections.
    gone: HashMap<u64, Gone>,
    slots: Slots,
    /// Where the kernel meets apps, and for which slot.
    listeners: HashMap<SocketAddr, u32>,
    /// What is in force, by slot.
    plans: HashMap<u32, Plan>,
    /// Addresses that no plan names any more, but connections to them may be open.
    retired: Vec<Retired>,
    /// Bytes of open connections that are in the counters already, by cookie.
    settled: HashMap<u64, (u64, u64)>,
    /// Misses that are in the counters already.
    missed: [u64; MISSES.len()],
    /// Ends that the kernel told nobody, of which we have told.
    untold: u64,
}

struct Gone {
    route: Arc<Route>,
    /// Since when it has no connection: the end of the last one may still have to be told.
    idle: Option<Instant>,
}

impl Direct {
    /// Takes over the tables, in which there is no route yet, and keeps them true until the process ends.
    pub fn start(
        mut tables: Tables,
        ends: Ends,
        destroyer: Option<Destroyer>,
        stale_after: Option<Duration>,
        metrics: &Metrics,
    ) -> Result<Arc<Self>> {
        tables.listen(&[])?;
        // All this may have begun under an ambassador before this one, whose counters have it.
        let open = tables.open();
        let live = if open.is_empty() { HashMap::new() } else { live_figures() };
        let settled = open.iter().filter_map(|(cookie, _)| live.get_key_value(cookie));
        let state = State {
            routes: HashMap::new(),
            gone: HashMap::new(),
            slots: Slots::new(tables.room()),
            listeners: HashMap::new(),
            plans: HashMap::new(),
            retired: tables.targets().into_iter().map(|it| Retired::of(it, None)).collect(),
            missed: tables.missed(),
            settled: settled.map(|(cookie, bytes)| (*cookie, *bytes)).collect(),
            untold: 0,
            tables,
        };
        let direct = Arc::new(Self {
            state: Mutex::new(state),
            stale_after,
            destroyer,
            unreachable: Throttle::default(),
            missed: MISSES.map(|reason| metrics.direct_missed(reason)),
        });
        tokio::spawn(Arc::clone(&direct).keep_fresh());
        tokio::spawn(Arc::clone(&direct).record(ends));
        Ok(direct)
    }

    /// Puts the tables in force.
    pub fn open_tables(&self) -> Result<()> {
        self.state().tables.renew(self.stale_after)
    }

    /// Replaces the routes. Those that are carried so are in force when it returns; one that goes on is in
    /// force all the while. It may wait for the kernel.
    pub fn change(self: &Arc<Self>, routes: &[Arc<Route>]) -> Result<()> {
        if self.state().take_away(routes) {
            tables::wait_for_hooks();
        }
        let added = self.state().add(routes);
        // Also if one of them could not be added: what the others had before is no more.
        self.update();
        routes.iter().for_each(|route| self.count_past_us(route));
        added
    }

    /// Has the connections of a route counted that are carried past us.
    fn count_past_us(self: &Arc<Self>, route: &Route) {
        let id = route_id(&route.name);
        // Where nothing is, was or will be carried past us, counting would only cost every connection.
        if route.choice().tier < Tier::Direct && self.state().active(id) == 0 {
            return;
        }
        let direct = Arc::downgrade(self);
        route.count_past_us(move |ours| {
            let direct = direct.upgrade();
            direct.map(|direct| direct.exchange_counts(id, ours)).unwrap_or_default()
        });
        let direct = Arc::downgrade(self);
        route.count_past_us_by_address(move |at, ours| {
            let (At::Tcp(address), Some(direct)) = (at, direct.upgrade()) else {
                return Counts::default();
            };
            direct.exchange_counts_to(id, *address, ours)
        });
    }

    /// Puts in force what is true now: tiers and addresses.
    pub fn update(&self) {
        let mut state = self.state();
        let State { tables, routes, slots, plans, retired, .. } = &mut *state;
        for (id, route) in routes {
            let Some(slot) = slots.of(*id) else { continue };
            let plan = (route.choice().tier == Tier::Direct)
                .then(|| plan::of(*id, route))
                .filter(|plan| !plan.targets.is_empty());
            if plans.get(&slot) == plan.as_ref() {
                continue;
            }
            let written = match &plan {
                Some(plan) => tables.put(slot, plan),
                None => tables.withdraw(slot),
            };
            let before = match (written, plan) {
                (Ok(()), Some(plan)) => plans.insert(slot, plan),
                (Ok(()), None) => plans.remove(&slot),
                (Err(error), _) => {
                    warn!(route = %route.name, "cannot change its table: {error:#}");
                    None
                }
            };
            let addresses = before.into_iter().flat_map(|plan| plan.targets);
            let upstream = Some(&*route.upstream);
            retired.extend(addresses.map(|(address, _)| Retired::of((*id, address), upstream)));
        }
    }

    /// Nothing is redirected any more; connections that are open stay.
    pub fn close(&self) -> Result<()> {
        self.state().tables.close()
    }

    /// Whether there is somebody who may.
    pub fn ends_connections(&self) -> bool {
        self.destroyer.is_some()
    }

    /// Ends connections to hosts that are not good any more, on routes that want it so.
    pub fn leave_lost_hosts(&self) {
        if let Some(destroyer) = &self.destroyer {
            let lost = self.lost();
            if !lost.is_empty() {
                info!(connections = lost.len(), "ended: they lead to hosts that are lost");
                destroyer.end(lost);
            }
        }
    }

    /// Keeps the tables fresh.
    async fn keep_fresh(self: Arc<Self>) {
        let every = self.stale_after.map_or(Duration::from_secs(60), |time| time / RENEWALS);
        let mut renewal = interval(every);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            renewal.tick().await;
            let direct = Arc::clone(&self);
            // It may have many tables to write, which is not for a thread of the runtime.
            let _ = tokio::task::spawn_blocking(move || direct.freshen()).await;
        }
    }

    fn freshen(&self) {
        let mut state = self.state();
        if let Err(error) = state.tables.renew_if_open(self.stale_after) {
            warn!("cannot keep the kernel's tables fresh: {error:#}");
        }
        state.forget_retired();
        drop(state);
        // What failed before may work now, and ways to addresses may have come and gone.
        self.update();
    }

    /// Tells the kernel how many connections of a route are carried here, and gets how many are not.
    fn exchange_counts(&self, route: u64, ours: &dyn Fn() -> Counts) -> Counts {
        let mut state = self.state();
        // Read while nobody else tells it, so that the newest number is told last.
        if let Some(slot) = state.slots.of(route)
            && let Err(error) = state.tables.carry(slot, ours().into())
        {
            debug!("connections of both ways may exceed max_connections: {error:#}");
        }
        state.tables.route(route).map(Counts::from).unwrap_or_default()
    }

    /// The same, of those to one address.
    fn exchange_counts_to(&self, route: u64, address: SocketAddr, ours: Counts) -> Counts {
        let mut state = self.state();
        if let Err(error) = state.tables.carry_to(route, address, ours.into()) {
            debug!("connections of both ways may exceed per_endpoint: {error:#}");
        }
        state.tables.target(route, address).map(Counts::from).unwrap_or_default()
    }

    /// Connections of a route to an endpoint that are open.
    pub fn reached(&self, route: &str, endpoint: &Endpoint) -> u32 {
        let state = self.state();
        let hosts = endpoint.hosts();
        let targets = hosts.iter().filter_map(|host| host.address());
        let counted = targets.filter_map(|it| state.tables.target(route_id(route), it).ok());
        counted.map(|target| u32::try_from(target.active).unwrap_or(u32::MAX)).sum()
    }

    /// Connections that the hooks left to the listeners so far, by the reason.
    pub fn missed(&self) -> impl Iterator<Item = (&'static str, u64)> {
        MISSES.into_iter().zip(self.state().tables.missed())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes out of force what these routes do not have. Says whether hooks must be waited for before
    /// anything is added.
    fn take_away(&mut self, routes: &[Arc<Route>]) -> bool {
        self.forget_retired();
        let wanted: HashMap<_, _> = served(routes).collect();
        let gone = self.slots.keep(|route| wanted.contains_key(&route));
        let at: HashMap<SocketAddr, Option<u32>> = wanted
            .iter()
            .flat_map(|(id, route)| addresses(route).map(|it| (it, self.slots.of(*id))))
            .collect();
        let mut must_wait = false;
        let Self { tables, listeners, plans, retired, .. } = self;
        listeners.retain(|address, slot| {
            let stays = at.get(address) == Some(&Some(*slot));
            if !stays {
                must_wait = true;
                if let Err(error) = tables.leave(*address) {
                    warn!("cannot take {address} out of the kernel's tables: {error:#}");
                }
            }
            stays
        });
        for slot in gone {
            must_wait = true;
            if let Err(error) =
                tables.withdraw(slot).and_then(|()| tables.carry(slot, Carried::default()))
            {
                warn!("cannot take a route out of the kernel's tables: {error:#}");
            }
            let before = plans.remove(&slot).into_iter();
            retired.extend(before.flat_map(|plan| {
                let of = move |(address, _)| Retired::of((plan.route, address), None);
                plan.targets.into_iter().map(of)
            }));
        }
        must_wait
    }

    /// Makes these the routes, of which those listen here that can be carried so.
    fn add(&mut self, routes: &[Arc<Route>]) -> Result<()> {
        let all: HashMap<_, _> =
            routes.iter().map(|route| (route_id(&route.name), Arc::clone(route))).collect();
        let new = all.keys().filter(|id| self.route(**id).is_none());
        let untold: u64 = new.map(|id| self.tables.untold(*id)).sum();
        if untold > 0 {
            info!("{untold} connections ended without a record since the kernel half was loaded");
            self.untold += untold;
        }
        let before = std::mem::replace(&mut self.routes, all).into_iter();
        self.gone.extend(before.map(|(id, route)| (id, Gone { route, idle: None })));
        self.gone.retain(|id, _| !self.routes.contains_key(id));
        for (id, route) in served(routes) {
            let Some(slot) = self.slots.take(id) else { continue };
            for address in addresses(route) {
                if self.listeners.get(&address) != Some(&slot) {
                    self.tables.lead(address, slot)?;
                    self.listeners.insert(address, slot);
                }
            }
        }
        Ok(())
    }

    /// A route, be it one that is no more.
    fn route(&self, id: u64) -> Option<&Arc<Route>> {
        self.routes.get(&id).or_else(|| Some(&self.gone.get(&id)?.route))
    }

    /// Connections of a route that are open.
    fn active(&self, route: u64) -> u32 {
        let counted = self.tables.route(route);
        counted.map_or(0, |counted| u32::try_from(counted.active).unwrap_or(u32::MAX))
    }

    /// Ends that the kernel has told nobody of.
    fn untold(&self) -> u64 {
        self.routes.keys().chain(self.gone.keys()).map(|id| self.tables.untold(*id)).sum()
    }

    /// Makes room in the kernel for addresses to come, and gives up routes whose last connection has ended.
    fn forget_retired(&mut self) {
        let Self { tables, plans, retired, gone, .. } = self;
        let named: HashSet<_> = plans
            .values()
            .flat_map(|plan| plan.targets.iter().map(|(target, _)| (plan.route, *target)))
            .collect();
        // Named again, it is retired once more when that ends.
        retired.retain(|&Retired { route, address, .. }| {
            !named.contains(&(route, address)) && !tables.forget(route, address).unwrap_or(true)
        });
        gone.retain(|id, it| {
            let Ok(counted) = tables.route(*id) else { return false };
            if counted.active > 0 {
                it.idle = None;
                return true;
            }
            let idle = it.idle.get_or_insert_with(Instant::now).elapsed();
            // Of connections there never were, nothing can be told.
            (counted.chosen > 0 && idle < TOLD) || !tables.forget_route(*id).unwrap_or(true)
        });
    }
}

impl From<Counts> for Carried {
    fn from(Counts { active, pending }: Counts) -> Self {
        Self { active, pending }
    }
}

impl From<Target> for Counts {
    fn from(target: Target) -> Self {
        let count = |count| u32::try_from(count).unwrap_or(u32::MAX);
        Self { active: count(target.active), pending: count(target.pending) }
    }
}

/// The routes that the kernel may carry, by their ids.
fn served(routes: &[Arc<Route>]) -> impl Iterator<Item = (u64, &Arc<Route>)> {
    let can_be = |route: &&Arc<Route>| route.highest().tier == Tier::Direct;
    routes.iter().filter(can_be).map(|route| (route_id(&route.name), route))
}

/// Where the kernel meets a route's apps.
fn addresses(route: &Route) -> impl Iterator<Item = SocketAddr> {
    route.meant().listen.iter().flat_map(plan::loopback)
}

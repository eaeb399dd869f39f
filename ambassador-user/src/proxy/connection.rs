//! One accepted connection, from accept to its access record; and the set of all that are alive.
//!
//! Everything a connection holds is held by guards, so an end in order, an error and a cut by the
//! drain share one path: sockets that did not end in order are reset, the record is written, the
//! route's place is given back.

mod record;

use std::collections::HashMap;
use std::fmt;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use super::Shared;
use super::connect::{self, As, Connected};
use super::relay::{Broken, Traffic, relay};
use super::shortcut::{Candidate, Prospect};
use super::socket::Socket;
use super::splice::PipePool;
use crate::config::Tier;
use crate::metrics::TierMetrics;
use crate::route::{Admission, Route};
use crate::upstream::balance::Source;
use crate::upstream::circuit::Full;
use crate::upstream::host::Used;
pub use record::Outcome;
use record::Record;

/// Who connected.
#[derive(Debug, Clone)]
pub enum Peer {
    Tcp(std::net::SocketAddr),
    /// A client of this Unix socket; clients themselves have no address.
    Unix(Arc<Path>),
}

/// What can be told of a live connection.
#[derive(Debug)]
pub struct About {
    pub id: u64,
    pub peer: Peer,
    pub started: Instant,
    /// Unset while connecting.
    pub endpoint: OnceLock<Arc<str>>,
    /// The same.
    pub host: OnceLock<Used>,
    /// Whether it is ended because its host is.
    lost: AtomicBool,
    pub traffic: Traffic,
    admission: Admission,
    /// What of `traffic` the route's counters already have.
    settled: Mutex<(u64, u64)>,
}

/// All live connections: to list them, to wait for them, to cut them.
#[derive(Debug, Default)]
pub struct Connections {
    next: AtomicU64,
    live: Mutex<HashMap<u64, (Arc<About>, AbortHandle)>>,
    emptied: Notify,
}

impl Connections {
    /// Starts carrying an accepted connection.
    pub fn spawn(
        self: &Arc<Self>,
        admission: Admission,
        client: Socket,
        peer: Peer,
        shared: &Shared,
    ) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let about = Arc::new(About {
            id,
            peer,
            started: Instant::now(),
            endpoint: OnceLock::new(),
            host: OnceLock::new(),
            lost: AtomicBool::new(false),
            traffic: Traffic::default(),
            admission,
            settled: Mutex::default(),
        });
        let record = Record {
            about: Arc::clone(&about),
            connections: Arc::clone(self),
            outcome: Outcome::Cut,
        };
        let tier = about.admission.tier;
        let route = about.route();
        let shortcuts = shared.shortcuts.as_ref().filter(|_| route.may_have_prepared());
        let mut candidate = shortcuts.and_then(|it| it.candidate(client.as_fd()));
        if tier < Tier::Sockmap
            && let Some(candidate) = candidate.take()
        {
            // It connected just before its route was lowered.
            candidate.decline();
        }
        let pipes = (tier >= Tier::Splice).then(|| Arc::clone(&shared.pipes));
        let means = Means { pipes, candidate };
        // Held over the spawn: the task's record takes itself out, which must not come first.
        let mut live = self.live();
        let task = tokio::spawn(carry(record, client, means));
        live.insert(id, (about, task.abort_handle()));
    }

    /// Those alive now, oldest first.
    pub fn list(&self) -> Vec<Arc<About>> {
        let mut all: Vec<_> = self.live().values().map(|(about, _)| Arc::clone(about)).collect();
        all.sort_unstable_by_key(|about| about.id);
        all
    }

    pub fn count(&self) -> usize {
        self.live().len()
    }

    /// Brings the routes' byte counters up to date.
    pub fn settle(&self) {
        self.live().values().for_each(|(about, _)| about.settle());
    }

    /// By the names of their routes, the bytes that shortcuts have under way.
    pub fn in_flight(&self) -> HashMap<Arc<str>, u64> {
        let mut in_flight = HashMap::new();
        for (about, _) in self.live().values() {
            if let Some(shortcut) = about.traffic.shortcut.get() {
                *in_flight.entry(Arc::clone(&about.route().name)).or_default() +=
                    shortcut.in_flight();
            }
        }
        in_flight
    }

    /// Has those of some routes take no shortcut any more.
    pub fn close_shortcuts(&self, of: impl Fn(&Route) -> bool) {
        let live = self.live();
        let concerned = live.values().filter(|(about, _)| of(about.route()));
        let shortcuts = concerned.filter_map(|(about, _)| about.traffic.shortcut.get());
        shortcuts.for_each(|shortcut| shortcut.close());
    }

    /// Resolves when none is alive.
    pub async fn ended(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.count() == 0 {
                return;
            }
            emptied.await;
        }
    }

    /// Resets those that lead to a host that is not good any more, on routes that want it so.
    pub fn leave_lost_hosts(&self) -> usize {
        let live = self.live();
        let lost = live.values().filter(|(about, _)| about.is_lost());
        let lost = lost.inspect(|(about, task)| {
            about.lost.store(true, Ordering::Relaxed);
            task.abort();
        });
        lost.count()
    }

    /// Resets all that are alive; [`Connections::ended`] tells when they are gone.
    pub fn cut(&self) -> usize {
        let live = self.live();
        live.values().for_each(|(_, task)| task.abort());
        live.len()
    }

    fn live(&self) -> MutexGuard<'_, HashMap<u64, (Arc<About>, AbortHandle)>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl About {
    pub fn route(&self) -> &Arc<Route> {
        self.admission.route()
    }

    /// What carries it: a connection of the `sockmap` tier may have no shortcut.
    pub fn tier(&self) -> Tier {
        match self.admission.tier {
            Tier::Sockmap if self.traffic.shortcut.get().is_none() => Tier::Splice,
            tier => tier,
        }
    }

    /// Whether its host is not good any more, and the route wants to do without it then.
    fn is_lost(&self) -> bool {
        self.route().meant().upstream.closes_unhealthy()
            && self.host.get().is_some_and(|host| !host.is_good())
    }

    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    fn metrics(&self) -> &TierMetrics {
        self.route().metrics.of(self.tier())
    }

    /// Hands what has moved since the last time to the route's counters.
    fn settle(&self) {
        let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        let (up, down) = (self.traffic.up(), self.traffic.down());
        self.metrics().count_bytes(up - settled.0, down - settled.1);
        *settled = (up, down);
    }
}

/// What a connection may use, by the tier of its route.
struct Means {
    pipes: Option<Arc<PipePool>>,
    candidate: Option<Arc<dyn Candidate>>,
}

async fn carry(mut record: Record, client: Socket, means: Means) {
    let about = Arc::clone(&record.about);
    let route = about.route();
    let mut pair = Pair { client: Some(client), upstream: None };
    // Boxed: connecting takes a large state that an established connection must not carry along.
    let ours = As::Ambassador(means.candidate.clone());
    let source = about.peer.source();
    let connecting = connect::connect(&route.upstream, &ours, &source, route.circuit());
    let held = !route.upstream.connect.hold.is_zero();
    let connected = tokio::select! {
        connected = Box::pin(connecting) => connected,
        // It may take long, and a place, for nobody.
        () = has_left(&pair), if held => {
            record.outcome = Outcome::ClientReset;
            return;
        }
    };
    let (lease, host, _place) = match connected {
        Ok(Connected { socket, lease, host, place }) => {
            pair.upstream = Some(socket);
            about.admission.arrived();
            (lease, host, place)
        }
        Err(error) => {
            if let Some(failed) = route.unreachable.say_now() {
                warn!(
                    route = %route.name,
                    peer = %about.peer,
                    failed,
                    "cannot reach the upstream: {error:#}"
                );
            }
            record.outcome =
                if error.is::<Full>() { Outcome::Refused } else { Outcome::ConnectFailed };
            return;
        }
    };
    route.metrics.count_connect(about.age());
    // Set once, here.
    let _ = about.host.set(Used::new(&host));
    if about.is_lost() {
        // In the moment in which it was reached.
        record.outcome = Outcome::HostLost;
        return;
    }
    let _ = about.endpoint.set(Arc::clone(lease.endpoint().label()));

    record.outcome = match pair.relay(&means, &about).await {
        Ok(()) => Outcome::Ok,
        Err(Broken::Client(error)) => {
            debug!(route = %route.name, peer = %about.peer, "client: {error}");
            Outcome::ClientReset
        }
        Err(Broken::Upstream(error)) => {
            debug!(route = %route.name, peer = %about.peer, "upstream: {error}");
            Outcome::UpstreamReset
        }
        Err(Broken::Idle) => Outcome::IdleTimeout,
    };
    record.outcome.speak_of(&host, &route.upstream, about.traffic.down());
}

impl Peer {
    /// Where the connection comes from, for policies that go by that.
    fn source(&self) -> Source {
        match self {
            Self::Tcp(address) if !address.ip().to_canonical().is_loopback() => {
                Source::Elsewhere(address.ip().to_canonical())
            }
            Self::Tcp(_) | Self::Unix(_) => Source::Pod,
        }
    }
}

/// Waits until the client is there no more: its end alone does not say so.
async fn has_left(pair: &Pair) {
    match &pair.client {
        Some(client) => client.failed().await,
        None => std::future::pending().await,
    }
}

/// The two sockets of a connection: reset when dropped, unless they have ended in order.
struct Pair {
    client: Option<Socket>,
    upstream: Option<Socket>,
}

impl Pair {
    async fn relay(&mut self, means: &Means, about: &About) -> Result<(), Broken> {
        let (route, traffic) = (about.route(), &about.traffic);
        let (Some(client), Some(upstream)) = (&self.client, &self.upstream) else {
            return Ok(());
        };
        let allowed = || route.relay() >= Tier::Sockmap;
        let candidate = means.candidate.as_deref();
        let prospect = candidate.map(|candidate| Prospect { candidate, allowed: &allowed });
        let pipes = means.pipes.as_ref();
        relay(client, upstream, pipes, prospect, traffic, route.idle_timeout).await?;
        // In order: dropping a socket sends its FIN.
        self.client = None;
        self.upstream = None;
        Ok(())
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.client.take().into_iter().chain(self.upstream.take()).for_each(Socket::reset);
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

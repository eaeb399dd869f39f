//! What is told of the connections that the kernel made: those that are open, and those that have ended.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::Direct;
use crate::config::Tier;
use crate::datapath::tables::{
    self, End, Ends, IN_ORDER, NEVER_ESTABLISHED, RESET_BY_APP, RESET_BY_TARGET, TARGET_LOST,
    from_kernel,
};
use crate::proxy::connection::Outcome;
use crate::route::Route;
use crate::sockets;
use crate::sockets::destroy::Connection;
use crate::upstream::Endpoint;

/// How long ends are gathered before they are written down. The ring holds more than a node's worth of
/// them.
const GATHER: Duration = Duration::from_millis(50);

/// So many connections may end between two looks at what is open, which is more than the ring holds.
const SETTLED: usize = 4096;

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
    /// Connections that are open, oldest first. Takes time by the number of sockets there are.
    pub fn open(&self) -> Vec<OpenConnection> {
        let now = tables::now().unwrap_or(0);
        let live = live_figures();
        let state = self.state();
        let mut open = state.tables.open();
        open.sort_unstable_by_key(|(_, flow)| flow.started);
        let known = open.into_iter().filter_map(|(cookie, flow)| {
            let route = state.route(flow.key.route)?;
            let address = from_kernel(flow.key.address);
            let (endpoint, _) = route.upstream.host_at(address).unzip();
            Some(OpenConnection {
                cookie,
                route: Arc::clone(&route.name),
                peer: from_kernel(flow.local),
                endpoint: label(endpoint, address),
                bytes: live.get(&cookie).copied().unwrap_or_default(),
                age: Duration::from_nanos(now.saturating_sub(flow.started)),
            })
        });
        known.collect()
    }

    /// Connections to hosts that are not good any more, on routes that do not want those.
    pub(super) fn lost(&self) -> Vec<Connection> {
        let state = self.state();
        // To look at all that is open takes the kernel time by the room there is for it.
        let may_have = |(id, it): (&u64, &Arc<Route>)| {
            it.upstream.meant().closes_unhealthy() && state.active(*id) > 0
        };
        if !state.routes.iter().any(may_have) {
            return Vec::new();
        }
        let open = state.tables.open().into_iter();
        let lost = open.filter_map(|(cookie, flow)| {
            let upstream = &state.route(flow.key.route)?.upstream;
            let remote = from_kernel(flow.key.address);
            let unwanted = upstream.meant().closes_unhealthy();
            let (_, host) =
                upstream.host_at(remote).filter(|(_, host)| unwanted && !host.is_good())?;
            debug!(route = %flow.key.route, host = %host.at, "a connection to a lost host");
            Some(Connection { cookie, local: from_kernel(flow.local), remote })
        });
        lost.collect()
    }

    /// Brings the routes' figures up to date with connections that are open. Takes time by the number of
    /// sockets there are.
    pub fn settle(&self) {
        let mut state = self.state();
        state.forget_retired();
        let gone = state.gone.iter().map(|(id, gone)| (id, &gone.route));
        for (id, route) in state.routes.iter().chain(gone) {
            if let Some(metrics) = route.metrics.known(Tier::Direct) {
                metrics.active.set(state.active(*id).into());
            }
        }
        drop(state);
        self.settle_missed();
        let live = live_figures();
        // Held throughout: an end must not be counted between a look at what is open and the count.
        let mut state = self.state();
        let open = state.tables.open();
        if state.settled.len() > 2 * (open.len() + SETTLED) {
            // Of some the end was never told.
            let open: HashSet<_> = open.iter().map(|(cookie, _)| *cookie).collect();
            state.settled.retain(|cookie, _| open.contains(cookie));
        }
        for (cookie, flow) in open {
            let route = state.route(flow.key.route).map(Arc::clone);
            let (Some(route), Some(&(up, down))) = (route, live.get(&cookie)) else { continue };
            let settled = state.settled.entry(cookie).or_default();
            let more = (up.saturating_sub(settled.0), down.saturating_sub(settled.1));
            route.metrics.of(Tier::Direct).count_bytes(more.0, more.1);
            *settled = (settled.0 + more.0, settled.1 + more.1);
        }
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
    pub(super) async fn record(self: Arc<Self>, ends: Ends) -> io::Result<()> {
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
        let Some(route) = self.state().route(flow.key.route).map(Arc::clone) else { return };
        let address = from_kernel(flow.key.address);
        let (endpoint, host) = route.upstream.host_at(address).unzip();
        let endpoint = label(endpoint, address);
        let outcome = match end.outcome {
            IN_ORDER => Outcome::Ok,
            NEVER_ESTABLISHED => Outcome::ConnectFailed,
            RESET_BY_TARGET => Outcome::UpstreamReset,
            RESET_BY_APP => Outcome::ClientReset,
            TARGET_LOST => Outcome::HostLost,
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
        match host {
            Some(host) if outcome == Outcome::ConnectFailed => {
                route.upstream.unreached(&host, "an app could not reach it");
            }
            Some(host) => outcome.speak_of(&host, &route.upstream, end.bytes_down),
            None => {}
        }
        if outcome == Outcome::ConnectFailed {
            if let Some(failed) = self.unreachable.say_now() {
                warn!(route = %route.name, failed, "an app could not reach {endpoint} ({address})");
            }
        } else if flow.established != 0 {
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
        let untold = state.untold();
        let before = std::mem::replace(&mut state.untold, untold);
        if untold > before {
            warn!(
                "{} connections ended without a record: there were too many at once",
                untold - before
            );
        }
    }
}

/// The endpoint that an address belongs to, as the user wrote it; or the address, when it no longer
/// belongs to any.
fn label(endpoint: Option<&Arc<Endpoint>>, address: SocketAddr) -> Arc<str> {
    endpoint.map_or_else(|| address.to_string().into(), |it| Arc::clone(it.label()))
}

/// Bytes up and down of this namespace's connections, by cookie.
pub(super) fn live_figures() -> HashMap<u64, (u64, u64)> {
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

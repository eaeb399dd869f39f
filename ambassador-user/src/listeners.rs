//! All listen addresses of the routes, and who accepts at each. The one place that opens and closes them.
//!
//! An address that stays is kept as it is, whatever becomes of its route: nobody who connects meanwhile is
//! refused. Its accept loop is told of the route that has it now.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::config::{self, Listen};
use crate::drain::Drain;
use crate::proxy::listener::{self, Bound, Listener};
use crate::proxy::{self, Shared};
use crate::route::Route;

/// How long an accept loop may take to end; it waits for nobody.
const END: Duration = Duration::from_secs(1);

/// Those that are open.
pub struct Listeners {
    open: HashMap<Listen, Open>,
    shared: Shared,
    drain: Drain,
}

struct Open {
    listener: Arc<Listener>,
    socket_mode: u32,
    /// Whose connections come here. Its end closes the address.
    route: watch::Sender<Arc<Route>>,
    accepting: JoinHandle<()>,
}

/// Those that are about to close.
pub struct Closing(Vec<JoinHandle<()>>);

/// Addresses that are bound, and nobody accepts yet.
pub type Bindings = HashMap<Listen, Bound>;
/// The same, known to the runtime.
pub type Registered = HashMap<Listen, Arc<Listener>>;

/// Binds what these routes listen on.
pub fn bind(routes: &[config::Route]) -> Result<Bindings> {
    bind_beside(routes, &HashMap::new())
}

fn bind_beside(routes: &[config::Route], open: &HashMap<Listen, Open>) -> Result<Bindings> {
    let mut bindings = Bindings::new();
    let wanted: HashSet<_> = routes.iter().flat_map(|it| &it.listen).map(address).collect();
    let going: Vec<_> = open.iter().filter(|(address, _)| !wanted.contains(address)).collect();
    for route in routes {
        for listen in route.listen.iter().filter(|listen| !open.contains_key(&address(listen))) {
            let mut in_the_way = going.iter().filter(|(it, _)| share_a_port(it, listen)).peekable();
            let beside = in_the_way.peek().is_some();
            let neighbours: Vec<_> = in_the_way.map(|(_, it)| &it.listener).collect();
            let share = |share| neighbours.iter().try_for_each(|it| it.share_port(share));
            let bound = share(true)
                .context("share a port")
                .and_then(|()| listener::bind(listen, route.socket_mode, beside));
            share(false).context("share a port no more")?;
            if let Some(bound) = bound.with_context(|| format!("route {}", route.name))? {
                bindings.insert(address(listen), bound);
            }
        }
    }
    Ok(bindings)
}

/// Registers what is bound with the current runtime.
pub fn register(bindings: Bindings) -> Result<Registered> {
    let registered = bindings.into_iter().map(|(at, bound)| {
        let listener = bound.listen().context("register a listener with the runtime")?;
        Ok((at, Arc::new(listener)))
    });
    registered.collect()
}

impl Listeners {
    pub fn new(shared: Shared, drain: Drain) -> Self {
        Self { open: HashMap::new(), shared, drain }
    }

    /// Binds what these routes listen on and is not open yet. What is open stays as it is.
    pub fn bind(&self, routes: &[config::Route]) -> Result<Registered> {
        register(bind_beside(routes, &self.open)?)
    }

    /// Gives these routes their addresses, and opens those that are new.
    pub fn open(&mut self, routes: &[Arc<Route>], mut new: Registered) {
        for (route, listen) in listens(routes) {
            let at = address(listen);
            if let Some(open) = self.open.get_mut(&at) {
                open.lead_to(route);
            } else if let Some(listener) = new.remove(&at) {
                info!(route = %route.name, tier = %route.choice().tier, upstream = %route.upstream.name, "listening on {listener}");
                let socket_mode = route.meant().socket_mode;
                let (route, told) = watch::channel(Arc::clone(route));
                let (shared, drain) = (self.shared.clone(), self.drain.clone());
                let accepting = proxy::serve(Arc::clone(&listener), told, shared, drain);
                let accepting = tokio::spawn(accepting);
                self.open.insert(at, Open { listener, socket_mode, route, accepting });
            }
        }
    }

    /// Closes what these routes do not have. Whoever waits there is accepted first.
    pub fn close_others(&mut self, routes: &[Arc<Route>]) -> Closing {
        let wanted: HashSet<_> = listens(routes).map(|(_, listen)| address(listen)).collect();
        let others = self.open.extract_if(|at, _| !wanted.contains(at));
        let close = |Open { listener, route, accepting, .. }: Open| {
            info!(route = %route.borrow().name, "listening on {listener} no more");
            accepting
        };
        Closing(others.map(|(_, open)| close(open)).collect())
    }

    /// Resolves when the drain has closed all of them.
    pub async fn closed(&mut self) {
        for open in self.open.values_mut() {
            let _ = (&mut open.accepting).await;
        }
        self.open.clear();
    }

    /// Closes all of them at once.
    pub fn abort(&mut self) {
        self.open.drain().for_each(|(_, open)| open.accepting.abort());
    }
}

impl Closing {
    /// Resolves when they are closed, or should be.
    pub async fn done(self) {
        let ended = async {
            for accepting in self.0 {
                let _ = accepting.await;
            }
        };
        if timeout(END, ended).await.is_err() {
            warn!("listeners that are given up take long to close");
        }
    }
}

impl Open {
    fn lead_to(&mut self, route: &Arc<Route>) {
        if Arc::ptr_eq(&self.route.borrow(), route) {
            return;
        }
        let before = self.route.send_replace(Arc::clone(route));
        if before.may_have_prepared() {
            // Clients of the route before may be waiting.
            route.prepares_clients();
        }
        let mode = route.meant().socket_mode;
        if self.socket_mode != mode {
            match self.listener.set_mode(mode) {
                Ok(()) => self.socket_mode = mode,
                Err(error) => warn!("set the mode of {}: {error}", self.listener),
            }
        }
    }
}

fn listens(routes: &[Arc<Route>]) -> impl Iterator<Item = (&Arc<Route>, &Listen)> {
    routes.iter().flat_map(|route| route.meant().listen.iter().map(move |listen| (route, listen)))
}

/// What of a listen address tells it from others.
fn address(listen: &Listen) -> Listen {
    match listen {
        Listen::Tcp { address, .. } => Listen::Tcp { address: *address, if_available: false },
        Listen::Unix(path) => Listen::Unix(path.clone()),
    }
}

/// Whether the two can be bound side by side only if both are willing to share.
fn share_a_port(one: &Listen, other: &Listen) -> bool {
    let tcp = |listen: &Listen| -> Option<SocketAddr> {
        match listen {
            Listen::Tcp { address, .. } => Some(*address),
            Listen::Unix(_) => None,
        }
    };
    let (Some(one), Some(other)) = (tcp(one), tcp(other)) else { return false };
    one.port() == other.port() && one.is_ipv4() == other.is_ipv4()
}

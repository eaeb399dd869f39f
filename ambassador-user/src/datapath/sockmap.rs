//! The `sockmap` tier: what a client sends goes straight to its upstream's socket (latch protocol).
//!
//! The programs decide about every message; this half opens and ends flows, forwards what took the native
//! way, and checks the account. Whatever fails here leaves a connection to the plain relay.

pub mod layout;

mod flow;
mod places;
mod shared;

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::Instant;

use ambassador_ebpf::sockmap::{
    ANY_CLIENT, CLIENT_SOCKETS, ENROL_LISTENERS, ENROLLED, FLOWS, ListenerKey, MOST_FLOWS, ORDERS,
    Orders, PROGRESS, Progress, TURNED_UNFIT, Tuple, UPLINK_SOCKETS, UPLINK_TAGS,
};
use anyhow::{Context, Result, anyhow};
use aya::maps::{HashMap, MapData, SkStorage, SockHash};
use tracing::debug;

use super::kernel::netns_cookie;
use super::programs::Maps;
use super::tables::to_kernel;
use crate::config::InFlight;
use crate::proxy::shortcut::{Candidate, Shortcut, Shortcuts};
use crate::throttle::Throttle;
use flow::Flow;
pub(super) use flow::is_diverted;
use places::Places;
use shared::Shared;

/// Which clients of a listener to enrol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enrol {
    Anybody,
    /// Those that would hardly notice: that are non-blocking, and want no completions of MSG_ZEROCOPY.
    Unnoticed,
    Nobody,
}

/// The loaded and attached kernel half of the tier, as connections use it.
#[derive(Debug)]
pub struct Sockmap(Arc<Kernel>);

impl Sockmap {
    /// On the maps of a loaded object, or of its pins. Flows and listeners of a process that is no more end.
    pub fn new(maps: &mut Maps, limits: InFlight) -> Result<Self> {
        let orders = Shared::new(maps, ORDERS, size_of::<Orders>())?;
        let progress = Shared::new(maps, PROGRESS, size_of::<Progress>())?;
        flow::end_all(&orders);
        let mut tables = Tables {
            netns: netns_cookie()?,
            listeners: maps.take(ENROL_LISTENERS)?,
            enrolled: maps.take(ENROLLED)?,
            clients: maps.take(CLIENT_SOCKETS)?,
            upstreams: maps.take(UPLINK_SOCKETS)?,
            tags: maps.take(UPLINK_TAGS)?,
            flows: maps.take(FLOWS)?,
            places: Places::new(MOST_FLOWS),
        };
        let ended: Vec<_> = tables.flows.keys().filter_map(Result::ok).collect();
        for tuple in ended {
            let _ = tables.flows.remove(&tuple);
        }
        let gone: Vec<_> = tables.listeners.keys().filter_map(Result::ok).collect();
        for listener in gone {
            let _ = tables.listeners.remove(&listener);
        }
        let (full, diverted, tables) = (Throttle::default(), Once::new(), Mutex::new(tables));
        Ok(Self(Arc::new(Kernel { orders, progress, limits, full, diverted, tables })))
    }

    /// Enrols from now on clients that connect to an address.
    pub fn enrol(&self, listener: SocketAddr, whom: Enrol) -> Result<()> {
        let mut tables = self.0.tables();
        let key = tables.listener(listener);
        let flags = match whom {
            Enrol::Anybody => ANY_CLIENT,
            Enrol::Unnoticed => 0,
            Enrol::Nobody => {
                // It fails if it is not there.
                let _ = tables.listeners.remove(&key);
                return Ok(());
            }
        };
        tables.listeners.insert(key, flags, 0).context("add to the map of listeners")
    }
}

impl Shortcuts for Sockmap {
    fn candidate(&self, client: BorrowedFd<'_>) -> Option<Arc<dyn Candidate>> {
        let tuple = tuple(client).ok()?;
        self.0.tables().enrolled.get(&tuple, 0).ok()?;
        let (kernel, forgotten) = (Arc::clone(&self.0), AtomicBool::new(false));
        Some(Arc::new(Enrolled { kernel, tuple, forgotten }))
    }
}

/// A client whose socket was enrolled.
#[derive(Debug)]
struct Enrolled {
    kernel: Arc<Kernel>,
    tuple: Tuple,
    forgotten: AtomicBool,
}

impl Enrolled {
    /// None where it had to make room for others.
    fn flags(&self) -> Option<u64> {
        self.kernel.tables().enrolled.get(&self.tuple, 0).ok()
    }

    /// Once: later, what is there may be another client's.
    fn forget(&self) {
        if !self.forgotten.swap(true, Ordering::Relaxed) {
            let _ = self.kernel.tables().enrolled.remove(&self.tuple);
        }
    }
}

impl Candidate for Enrolled {
    fn prepare(&self, upstream: BorrowedFd<'_>) {
        // Without the mark no flow is opened on it.
        if let Err(error) = self.kernel.tables().tags.insert(&upstream, 0, 0) {
            debug!("mark a socket for the uplink: {error}");
        }
    }

    fn can_have(&self) -> bool {
        let can = self.flags().is_some_and(|flags| flags & TURNED_UNFIT == 0);
        if !can {
            self.decline();
        }
        can
    }

    fn open(
        &self,
        client: BorrowedFd<'_>,
        upstream: BorrowedFd<'_>,
        forwarded: u64,
    ) -> Option<Arc<dyn Shortcut>> {
        let flags = self.flags()?;
        self.forget();
        let opened = if flags & TURNED_UNFIT == 0 {
            Flow::open(&self.kernel, self.tuple, flags, client, upstream, forwarded)
        } else {
            Err(anyhow!("its app would notice"))
        };
        match opened {
            Ok(flow) => Some(Arc::new(flow)),
            Err(error) => {
                debug!("no uplink: {error:#}");
                self.kernel.hand_back(&self.tuple);
                None
            }
        }
    }

    fn decline(&self) {
        self.forget();
        self.kernel.hand_back(&self.tuple);
    }
}

impl Drop for Enrolled {
    fn drop(&mut self) {
        self.forget();
    }
}

/// What all flows share.
#[derive(Debug)]
struct Kernel {
    orders: Shared,
    progress: Shared,
    limits: InFlight,
    full: Throttle,
    /// Whether it was said that another program is in the way.
    diverted: Once,
    tables: Mutex<Tables>,
}

/// What is looked up by key. Held for a few system calls, none of which waits.
struct Tables {
    /// The cookie of the network namespace that we listen in.
    netns: u64,
    listeners: HashMap<MapData, ListenerKey, u64>,
    enrolled: HashMap<MapData, Tuple, u64>,
    clients: SockHash<MapData, Tuple>,
    upstreams: SockHash<MapData, u64>,
    tags: SkStorage<MapData, u64>,
    flows: HashMap<MapData, Tuple, u64>,
    places: Places,
}

impl Kernel {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a client's socket an ordinary one again. Nothing of it may be under way.
    fn hand_back(&self, client: &Tuple) {
        // It fails if the socket is closed already.
        let _ = self.tables().clients.remove(client);
    }

    fn take_place(&self) -> Option<u32> {
        self.tables().places.take(Instant::now())
    }
}

impl Tables {
    fn listener(&self, address: SocketAddr) -> ListenerKey {
        ListenerKey {
            netns: self.netns,
            address: to_kernel(address).ip,
            port: address.port().into(),
            _zero: 0,
        }
    }
}

impl fmt::Debug for Tables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tables").field("places", &self.places).finish_non_exhaustive()
    }
}

/// Both ends of the client's connection, as the client sees them.
fn tuple(accepted: BorrowedFd<'_>) -> Result<Tuple> {
    let socket = socket2::SockRef::from(&accepted);
    let client = socket.peer_addr().context("ask for the peer")?.as_socket();
    let listener = socket.local_addr().context("ask for the address")?.as_socket();
    let (client, listener) = client.zip(listener).context("it is not a TCP socket")?;
    Ok(Tuple {
        client: to_kernel(client).ip,
        listener: to_kernel(listener).ip,
        client_port: client.port().into(),
        listener_port: listener.port().into(),
    })
}

//! The `sockmap` tier: what a client sends goes straight to its upstream's socket (latch protocol).
//!
//! The programs decide about every message; this half opens and ends flows, forwards what took the native
//! way, and checks the account. Whatever fails here leaves a connection to the plain relay.

pub mod layout;

mod flow;
mod places;
mod shared;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ambassador_ebpf::sockmap::{
    ANY_CLIENT, CLIENT_SOCKETS, ENROL, ENROL_LISTENERS, ENROLLED, FLOWS, ListenerKey, MOST_FLOWS,
    ORDERS, Orders, PROGRESS, Progress, SOCKET_LAYOUT, Tuple, UPLINK, UPLINK_SOCKETS, UPLINK_TAGS,
};
use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData, SkStorage, SockHash};
use aya::programs::sk_msg::SkMsgLink;
use aya::programs::sock_ops::SockOpsLink;
use aya::programs::{CgroupAttachMode, SkMsg, SockOps};
use aya::{Ebpf, EbpfLoader};
use tracing::debug;

use super::object;
use crate::proxy::shortcut::{Shortcut, Shortcuts};
use flow::Flow;
use places::Places;
use shared::Shared;

/// Bounds of what is in flight on a connection: sent, and not acknowledged by the upstream.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub bytes: u64,
    pub messages: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 1024 * 1024, messages: 2048 }
    }
}

/// The loaded and attached kernel half of the tier, as connections use it.
#[derive(Debug)]
pub struct Sockmap(Arc<Kernel>);

/// The programs' attachments, which end when this is dropped.
#[must_use = "dropping it detaches the programs"]
pub struct Attached {
    _uplink: SkMsgLink,
    _enrol: SockOpsLink,
}

/// Loads the tier by itself for a cgroup, opened as a directory, and all below it.
pub fn load(cgroup: impl AsFd, limits: Limits) -> Result<(Sockmap, Attached)> {
    let object = object().context("this binary was built without the eBPF object")?;
    let layout = layout::of_this_kernel()?;
    let mut kernel = EbpfLoader::new()
        .override_global(SOCKET_LAYOUT, &layout, true)
        .load(object.bytes)
        .context("load the eBPF object")?;
    let attached = attach(&mut kernel, cgroup)?;
    Ok((Sockmap::new(|name| kernel.take_map(name), limits)?, attached))
}

/// Loads and attaches the programs. The loader must have set the layout of sockets.
pub fn attach(kernel: &mut Ebpf, cgroup: impl AsFd) -> Result<Attached> {
    let sockets = kernel.map(CLIENT_SOCKETS).context("find the map of client sockets")?;
    let sockets: SockHash<_, Tuple> =
        sockets.try_into().context("open the map of client sockets")?;
    let sockets = sockets.fd().try_clone().context("open the map of client sockets once more")?;
    let uplink: &mut SkMsg = kernel
        .program_mut(UPLINK)
        .context("find the uplink in the eBPF object")?
        .try_into()
        .context("open the uplink")?;
    uplink.load().context("load the uplink")?;
    let link = uplink.attach(&sockets).context("attach the uplink to the client sockets")?;
    let _uplink = uplink.take_link(link).context("own the uplink's attachment")?;
    // Last, because from now on sockets are enrolled.
    let enrol: &mut SockOps = kernel
        .program_mut(ENROL)
        .context("find the enrolment in the eBPF object")?
        .try_into()
        .context("open the enrolment")?;
    enrol.load().context("load the enrolment")?;
    let link = enrol
        .attach(cgroup, CgroupAttachMode::Single)
        .context("attach the enrolment to a cgroup")?;
    let _enrol = enrol.take_link(link).context("own the enrolment's attachment")?;
    Ok(Attached { _uplink, _enrol })
}

impl Sockmap {
    /// On the maps of a loaded object, or of its pins, by their names.
    pub fn new(mut map: impl FnMut(&str) -> Option<Map>, limits: Limits) -> Result<Self> {
        let mut map = |name| map(name).with_context(|| format!("find the map {name}"));
        let orders = Shared::new(&map(ORDERS)?, MOST_FLOWS, size_of::<Orders>())
            .context("share the map of orders")?;
        let progress = Shared::new(&map(PROGRESS)?, MOST_FLOWS, size_of::<Progress>())
            .context("share the map of progress")?;
        flow::forget_all(&orders);
        let tables = Tables {
            listeners: map(ENROL_LISTENERS)?.try_into().context("open the map of listeners")?,
            enrolled: map(ENROLLED)?.try_into().context("open the map of enrolled clients")?,
            clients: map(CLIENT_SOCKETS)?.try_into().context("open the map of client sockets")?,
            upstreams: map(UPLINK_SOCKETS)?.try_into().context("open the map of upstreams")?,
            tags: map(UPLINK_TAGS)?.try_into().context("open the map of upstreams' flows")?,
            flows: map(FLOWS)?.try_into().context("open the map of flows")?,
            places: Places::new(MOST_FLOWS),
        };
        Ok(Self(Arc::new(Kernel { orders, progress, limits, tables: Mutex::new(tables) })))
    }

    /// Enrols from now on the clients that connect to a listener: those that are non-blocking, or `any`.
    pub fn listen(&self, listener: BorrowedFd<'_>, any: bool) -> Result<()> {
        let address =
            socket2::SockRef::from(&listener).local_addr().context("ask for its address")?;
        let address = address.as_socket().context("it is not a TCP socket")?;
        let key = ListenerKey {
            netns: netns_cookie(listener).context("ask for its network namespace")?,
            address: words(address),
            port: address.port().into(),
            _zero: 0,
        };
        let flags = if any { ANY_CLIENT } else { 0 };
        self.0.tables().listeners.insert(key, flags, 0).context("add it to the map of listeners")
    }
}

impl Shortcuts for Sockmap {
    fn prepare(&self, upstream: BorrowedFd<'_>) {
        // Without the mark no flow is opened on it.
        if let Err(error) = self.0.tables().tags.insert(&upstream, 0, 0) {
            debug!("mark a socket for the uplink: {error}");
        }
    }

    fn open(&self, client: BorrowedFd<'_>, upstream: BorrowedFd<'_>) -> Option<Arc<dyn Shortcut>> {
        let tuple = tuple(client).ok()?;
        // What is not enrolled is a client that would notice.
        let flags = self.0.take_enrolled(&tuple)?;
        match Flow::open(&self.0, tuple, flags, upstream) {
            Ok(flow) => Some(Arc::new(flow)),
            Err(error) => {
                debug!("no uplink: {error:#}");
                // Nothing was redirected, so its socket may become an ordinary one at once.
                let _ = self.0.tables().clients.remove(&tuple);
                None
            }
        }
    }
}

/// What all flows share.
#[derive(Debug)]
struct Kernel {
    orders: Shared,
    progress: Shared,
    limits: Limits,
    tables: Mutex<Tables>,
}

/// What is looked up by key. Held for a few system calls, none of which waits.
struct Tables {
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

    /// The flags of the listener that a client was enrolled for, once.
    fn take_enrolled(&self, tuple: &Tuple) -> Option<u64> {
        let mut tables = self.tables();
        let flags = tables.enrolled.get(tuple, 0).ok()?;
        tables.enrolled.remove(tuple).ok()?;
        Some(flags)
    }

    fn take_place(&self) -> Option<u32> {
        self.tables().places.take(Instant::now())
    }
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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
        client: words(client),
        listener: words(listener),
        client_port: client.port().into(),
        listener_port: listener.port().into(),
    })
}

/// An address as the contract wants it: in network order, IPv4 as `::ffff:a.b.c.d`.
fn words(address: SocketAddr) -> [u32; 4] {
    let octets = match address {
        SocketAddr::V4(address) => address.ip().to_ipv6_mapped().octets(),
        SocketAddr::V6(address) => address.ip().octets(),
    };
    let mut words = [0; 4];
    for (word, octets) in words.iter_mut().zip(octets.as_chunks().0) {
        *word = u32::from_ne_bytes(*octets);
    }
    words
}

fn netns_cookie(socket: BorrowedFd<'_>) -> Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of_val(&cookie) as libc::socklen_t;
    // SAFETY: the pointers lead to the value and to its length.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    ensure!(failed == 0, "SO_NETNS_COOKIE: {}", io::Error::last_os_error());
    Ok(cookie)
}

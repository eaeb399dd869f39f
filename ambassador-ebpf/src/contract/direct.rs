//! What the halves of the `direct` tier say to each other.
//!
//! User space says where routes listen and where they lead; the kernel counts what became of it. No
//! element that both sides know has two writers.

use crate::Address;

/// The program of connect(2) on an IPv4 socket.
pub const CONNECT4: &str = "connect4";
/// The program of connect(2) on an IPv6 socket.
pub const CONNECT6: &str = "connect6";
/// The program of getpeername(2) on an IPv4 socket.
pub const GETPEERNAME4: &str = "getpeername4";
/// The program of getpeername(2) on an IPv6 socket.
pub const GETPEERNAME6: &str = "getpeername6";
/// The program that sees the life of redirected connections.
pub const LIFECYCLE: &str = "lifecycle";

/// An array of one [`Settings`].
pub const SETTINGS: &str = "SETTINGS";
/// A hash from the [`Address`] an app connects to, to the index of its route.
pub const LISTENERS: &str = "LISTENERS";
/// An array, by route: the index of the table in force, or [`NO_TABLE`].
pub const ROUTES: &str = "ROUTES";
/// An array of [`Carried`], by route: the connections that user space carries. They count for its limits.
pub const CARRIED: &str = "CARRIED";
/// A hash from [`TargetKey`] to [`Carried`]: the same by address, on routes that have limits for one.
pub const CARRIED_TO: &str = "CARRIED_TO";
/// An array of [`Table`]. Each route has two, `2 * route` and the next one; the one that is not in
/// force is written, then put in force, so that no program ever reads a half-written table.
pub const TABLES: &str = "TABLES";
/// A hash from [`TargetKey`] to [`Target`].
pub const TARGETS: &str = "TARGETS";
/// An array of counters: connections to a routed address that were left to user space, by the reason.
pub const MISSES: &str = "MISSES";
/// Socket storage of [`Flow`].
pub const REDIRECTED: &str = "REDIRECTED";
/// A hash from a socket's cookie to its [`Flow`], of connections that are open.
pub const OPEN: &str = "OPEN";
/// A ring of [`End`].
pub const ENDS: &str = "ENDS";
/// A read-only variable: where `skc_ipv6only` lies, in bits from the start of a `struct sock_common`;
/// 0 if that is unknown or may not be read.
pub const IPV6ONLY_BIT: &str = "IPV6ONLY_BIT";

/// A read-only variable: where `sk_err` lies, in bytes from the start of a `struct tcp_sock`; 0 if that is
/// unknown or may not be read.
pub const SOCKET_ERROR: &str = "SOCKET_ERROR";

/// A read-only variable: where `is_mptcp` lies, in bytes from the start of a `struct tcp_sock`; 0 if that is
/// unknown or may not be read.
pub const MULTIPATH: &str = "MULTIPATH";

/// In `ROUTES`: the route is not in force, and its connections stay with user space.
pub const NO_TABLE: u32 = u32::MAX;
/// Most routes.
pub const MOST_ROUTES: u32 = 1024;
/// Most addresses that connect hooks spread a route's connections over.
pub const SLOTS: usize = 64;
/// Most turns of a weighted round until it repeats.
pub const TURNS: usize = 128;

/// For how long an address that could not be connected to is passed over, while there are others.
pub const SUSPICION_NS: u64 = 5_000_000_000;

/// For how long an address whose server has ended a connection is not led to, while there are others: the
/// server may be gone, which user space can find out without any app noticing.
pub const DOUBT_NS: u64 = 1_000_000_000;
/// An app that gives up a connect sooner says nothing of its target.
pub const PATIENCE_NS: u64 = 200_000_000;
/// After so many ends of its own that it survived, a server's ends say nothing any more.
pub const SURVIVALS: u64 = 8;

/// In [`Table::policy`]: the slot of the turn, or else the slots in their order.
pub const FAILOVER: u32 = 0;
/// In [`Table::policy`]: the slot of the turn, or else those after it.
pub const ROUND_ROBIN: u32 = 1;
/// In [`Table::policy`]: the slot with the fewest connections for its weight.
pub const LEAST_CONNECTIONS: u32 = 2;
/// In [`Table::policy`]: the slot with fewer connections for its weight, of two that are drawn from the
/// turns.
pub const RANDOM_TWO: u32 = 3;

/// In `MISSES`: the app chose where its connection comes from.
pub const BOUND: u32 = 0;
/// In `MISSES`: the route was not in force, or full, or none of its addresses would do.
pub const NO_TARGET: u32 = 1;
/// In `MISSES`: a map was full.
pub const NO_ROOM: u32 = 2;
/// How many reasons there are.
pub const MISS_REASONS: u32 = 3;

/// For whom and until when the tables are in force; and what loaded them, for those who find them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// [`crate::VERSION`].
    pub version: u32,
    /// Whether they outlive whoever runs them: they were loaded apart from it.
    pub kept: u8,
    /// Whether the hooks on connect(2) are attached, and passed the self-test.
    pub redirects: u8,
    /// Whether the self-test found that clients which `sockmap` enrols are told how many bytes wait to be read.
    pub counts_waiting_bytes: u8,
    pub reserved: u8,
    /// The network namespace whose sockets are redirected.
    pub netns_cookie: u64,
    /// The boot-time clock's nanosecond from which on nothing is redirected any more, unless it is
    /// put off in time. 0: nothing is redirected at all.
    pub fresh_until: u64,
    /// The inode of the cgroup that the programs are attached to.
    pub cgroup: u64,
    /// SHA-256 of the object.
    pub object: [u8; 32],
}

/// Where a route leads.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// [`route_id`] of the route's name.
    pub route: u64,
    /// [`FAILOVER`], [`ROUND_ROBIN`], [`LEAST_CONNECTIONS`] or [`RANDOM_TWO`].
    pub policy: u32,
    /// 1: nothing else can be tried, so no address is passed over.
    pub last_resort: u32,
    /// Most connections open at a time.
    pub limit: u32,
    /// How many of the turns are in use; at least 1.
    pub round: u32,
    /// Most connections being opened at a time.
    pub pending_limit: u32,
    /// Most connections to one address, and [`NO_LIMIT`] if it has no limits.
    pub limit_each: u32,
    /// Most connections being opened to one address.
    pub pending_limit_each: u32,
    /// 1: an address that is full is passed over. 0: its connections are refused.
    pub spills: u32,
    /// All in use: after the last address comes the first one again.
    pub slots: [Slot; SLOTS],
    /// Indices of slots, each as often in a round as its weight wants.
    pub turns: [u8; TURNS],
}

/// In [`Table`]: as many as there can be.
pub const NO_LIMIT: u32 = u32::MAX;

/// Connections that user space carries. One word, so that both are of the same instant.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Those that are open or being opened.
    pub active: u32,
    /// Those that are being opened.
    pub pending: u32,
}

/// One address a route leads to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    pub key: TargetKey,
    /// At least 1.
    pub weight: u32,
    /// [`IPV4`] or [`IPV6`].
    pub family: u32,
}

/// In [`Slot::family`].
pub const IPV4: u32 = 1;
/// In [`Slot::family`].
pub const IPV6: u32 = 2;

/// An address as a target of a route. The address that is all zero stands for the route itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TargetKey {
    pub route: u64,
    pub address: Address,
    /// Always 0.
    pub reserved: u32,
}

/// What became of the connections to a target. Written by the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Connections that are open or being opened.
    pub active: u64,
    /// Of the route itself: connections led elsewhere over all time, which is the turn of its round.
    pub chosen: u64,
    /// The boot-time clock's nanosecond until which it is suspected of not answering.
    pub suspect_until: u64,
    /// Of the route itself: ends that nobody was told of, because the ring was full.
    pub untold: u64,
    /// The boot-time clock's nanosecond until which it may be gone: it has ended a connection itself.
    pub doubt_until: u64,
    /// How often it did that and could be connected to afterwards.
    pub survived: u64,
    /// Connections that are being opened.
    pub pending: u64,
}

/// One redirected socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    pub key: TargetKey,
    /// When connect(2) was called, in nanoseconds of the boot-time clock.
    pub started: u64,
    /// When the connection was established, or 0.
    pub established: u64,
    /// `bytes_received` when the kernel began to wait for the peer's FIN alone.
    pub received_before_fin: u64,
    /// The address that the app asked for.
    pub original: Address,
    /// In which states of targets it is counted as open, as bits: its address's, its route's.
    pub counted: u32,
    /// The app's own address.
    pub local: Address,
    /// Keeps the size a multiple of eight.
    pub reserved: u32,
}

/// What became of one redirected connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    pub flow: Flow,
    /// The socket's cookie.
    pub cookie: u64,
    /// When it ended, in nanoseconds of the boot-time clock.
    pub ended: u64,
    /// Bytes that the peer has acknowledged.
    pub bytes_up: u64,
    /// Bytes that arrived here.
    pub bytes_down: u64,
    /// Smoothed round-trip time.
    pub rtt_us: u32,
    /// Segments that were sent again.
    pub retransmits: u32,
    /// [`IN_ORDER`], [`NEVER_ESTABLISHED`], or one of those of a reset.
    pub outcome: u32,
    /// Keeps the size a multiple of eight.
    pub reserved: u32,
}

/// In [`End::outcome`]: both sides, or the app alone, said their last byte.
pub const IN_ORDER: u32 = 0;
/// In [`End::outcome`]: one of the sides gave up.
pub const RESET: u32 = 1;
/// In [`End::outcome`]: the target refused, or did not answer.
pub const NEVER_ESTABLISHED: u32 = 2;
/// In [`End::outcome`]: the target gave up, or could not be reached any more.
pub const RESET_BY_TARGET: u32 = 3;
/// In [`End::outcome`]: the app gave up, be it before it was there.
pub const RESET_BY_APP: u32 = 4;
/// In [`End::outcome`]: the ambassador ended it, because its target is lost.
pub const TARGET_LOST: u32 = 5;

impl TargetKey {
    /// A route itself.
    #[must_use]
    #[inline(always)]
    pub const fn of_route(route: u64) -> Self {
        Self { route, address: Address { ip: [0; 4], port: 0 }, reserved: 0 }
    }
}

/// What stands for a route's name: the same after a restart, and in the next version (FNV-1a).
#[must_use]
pub const fn route_id(name: &str) -> u64 {
    let name = name.as_bytes();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut at = 0;
    while at < name.len() {
        hash = (hash ^ name[at] as u64).wrapping_mul(0x0100_0000_01b3);
        at += 1;
    }
    hash
}

const _: () = {
    use core::mem::offset_of;
    assert!(offset_of!(Settings, netns_cookie) == 8);
    assert!(offset_of!(Settings, object) == 32);
    assert!(size_of::<Settings>() == 64);
    assert!(size_of::<Slot>() == 40);
    assert!(offset_of!(Table, slots) == 40);
    assert!(offset_of!(Table, turns) == 40 + 40 * SLOTS);
    assert!(size_of::<Table>() == 40 + 40 * SLOTS + TURNS);
    assert!(size_of::<Carried>() == 8);
    assert!(size_of::<TargetKey>() == 32);
    assert!(size_of::<Target>() == 56);
    assert!(offset_of!(Flow, original) == 56);
    assert!(offset_of!(Flow, local) == 80);
    assert!(size_of::<Flow>() == 104);
    assert!(offset_of!(End, rtt_us) == 136);
    assert!(size_of::<End>() == 152);
};

#[cfg(not(target_arch = "bpf"))]
mod pod {
    // SAFETY: all `repr(C)`, integers only, and no padding, as asserted above.
    unsafe impl aya::Pod for super::Settings {}
    // SAFETY: see above.
    unsafe impl aya::Pod for super::Table {}
    // SAFETY: see above.
    unsafe impl aya::Pod for super::Carried {}
    // SAFETY: see above.
    unsafe impl aya::Pod for super::TargetKey {}
    // SAFETY: see above.
    unsafe impl aya::Pod for super::Target {}
    // SAFETY: see above.
    unsafe impl aya::Pod for super::Flow {}
}

//! The `direct` tier: an app that connects to a routed address is connected to the upstream itself.
//!
//! - programs: `cgroup/connect4`, `cgroup/connect6`, `cgroup/getpeername4`, `cgroup/getpeername6`,
//!   attached to the pod's cgroup
//! - kernel: 5.14 (with it user space can learn its namespace's cookie; the hooks are from 4.17 and 5.8)
//! - maps: `SETTINGS`, `LISTENERS`, `ROUTES`, `CARRIED`, `CARRIED_TO`, `TABLES` (read), `TARGETS` (make, count a
//!   turn), `MISSES` (count), `REDIRECTED` (make, read, delete)
//! - byte order: addresses and ports stay in network order throughout
//! - on failure: the address is left as the app gave it, and the connection goes to the user-space
//!   listener on that address. The programs always return 1, so that no call is ever refused.

use ambassador_ebpf::Address;
use ambassador_ebpf::direct::{
    BOUND, Flow, IPV4, IPV6, NO_ROOM, NO_TABLE, NO_TARGET, Table, Target, TargetKey,
};
use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_F_CURRENT_NETNS, BPF_NOEXIST, bpf_sock, bpf_sock_addr, bpf_sock_tuple,
    bpf_sock_tuple__bindgen_ty_1 as Tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as TupleV4,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as TupleV6,
};
use aya_ebpf::helpers::{
    bpf_get_netns_cookie, bpf_sk_lookup_tcp, bpf_sk_release, bpf_skc_to_tcp_sock,
    bpf_skc_to_tcp6_sock,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::balance::{Wish, choose, is_full, whatever_it_is};
use crate::clock;
use crate::counter;
use crate::maps::{CARRIED, LISTENERS, MISSES, REDIRECTED, ROUTES, SETTINGS, TABLES, TARGETS};

/// What the kernel expects of a program that lets a call go on.
const GO_ON: i32 = 1;

const SOCK_STREAM: u32 = 1;
const IPPROTO_TCP: u32 = 6;

/// See [`ambassador_ebpf::direct::IPV6ONLY_BIT`].
#[unsafe(no_mangle)]
static IPV6ONLY_BIT: u32 = 0;

/// See [`ambassador_ebpf::direct::MULTIPATH`].
#[unsafe(no_mangle)]
static MULTIPATH: u32 = 0;

/// Why a connection is left as it is.
enum Miss {
    /// Not a TCP connection to a routed address of ours, in our namespace, at a time when tables hold.
    NotOurs,
    /// The app chose where the connection comes from, as the ambassador does.
    Bound,
    /// The route is not in force, or full, or none of its addresses will do.
    NoTarget,
    /// A map has no room.
    NoRoom,
}

/// An IPv4 socket is about to be connected.
#[cgroup_sock_addr(connect4)]
pub(crate) fn connect4(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    let bpf_sock_addr { user_ip4: ip, user_port: port, .. } = *asked(&ctx);
    if let Ok(target) = redirect(&ctx, Address::v4(ip, port), false)
        && let Some(ip) = target.as_v4()
    {
        // SAFETY: the kernel hands in a context that lives as long as the program runs.
        unsafe { (*addr).user_ip4 = ip };
        // SAFETY: see above.
        unsafe { (*addr).user_port = target.port };
    }
    GO_ON
}

/// An IPv6 socket is about to be connected, be it to a v4-mapped address.
#[cgroup_sock_addr(connect6)]
pub(crate) fn connect6(ctx: SockAddrContext) -> i32 {
    let bpf_sock_addr { user_ip6: ip, user_port: port, .. } = *asked(&ctx);
    if let Ok(target) = redirect(&ctx, Address { ip, port }, true) {
        show(&ctx, target);
    }
    GO_ON
}

/// An app asks where its IPv4 socket leads.
#[cgroup_sock_addr(getpeername4)]
pub(crate) fn getpeername4(ctx: SockAddrContext) -> i32 {
    let addr = ctx.sock_addr;
    if let Some(flow) = flow(&ctx)
        && let Some(ip) = flow.original.as_v4()
    {
        // SAFETY: the kernel hands in a context that lives as long as the program runs.
        unsafe { (*addr).user_ip4 = ip };
        // SAFETY: see above.
        unsafe { (*addr).user_port = flow.original.port };
    }
    GO_ON
}

/// An app asks where its IPv6 socket leads.
#[cgroup_sock_addr(getpeername6)]
pub(crate) fn getpeername6(ctx: SockAddrContext) -> i32 {
    if let Some(flow) = flow(&ctx) {
        show(&ctx, &flow.original);
    }
    GO_ON
}

/// Replaces the address of an IPv6 socket.
#[inline(always)]
fn show(ctx: &SockAddrContext, address: &Address) {
    let addr = ctx.sock_addr;
    // Word by word, at offsets that are constant: else the compiler copies by way of a pointer, and the
    // verifier has "dereference of modified ctx ptr R8 off=8 disallowed".
    macro_rules! word {
        ($at:literal) => {
            // SAFETY: the kernel hands in a context that lives as long as the program runs.
            let place = unsafe { &raw mut (*addr).user_ip6[$at] };
            // SAFETY: see above.
            unsafe { place.write_volatile(address.ip[$at]) };
        };
    }
    word!(0);
    word!(1);
    word!(2);
    word!(3);
    // SAFETY: see above.
    unsafe { (*addr).user_port = address.port };
}

/// Where the connection goes instead, noted down for the other hooks.
#[inline(always)]
fn redirect(ctx: &SockAddrContext, original: Address, ipv6: bool) -> Result<&Address, Miss> {
    if asked(ctx).type_ != SOCK_STREAM || asked(ctx).protocol != IPPROTO_TCP {
        return Err(Miss::NotOurs);
    }
    try_redirect(ctx, original, ipv6).inspect_err(|miss| {
        count(miss);
        // This socket may have been redirected before.
        // SAFETY: the socket of the context lives as long as the program runs.
        let _: Result<(), i32> = unsafe { REDIRECTED.delete(socket(ctx)) };
    })
}

#[inline(always)]
fn try_redirect(ctx: &SockAddrContext, original: Address, ipv6: bool) -> Result<&Address, Miss> {
    // SAFETY: an element that is deleted is not used again while a hook may read it.
    let route = unsafe { LISTENERS.get(original) }.ok_or(Miss::NotOurs)?;
    if is_multipath(ctx) {
        return Err(Miss::NotOurs);
    }
    let settings = SETTINGS.get(0).ok_or(Miss::NotOurs)?;
    let now = clock::now();
    // SAFETY: the context is the kernel's own.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    if now >= settings.fresh_until || netns != settings.netns_cookie {
        return Err(Miss::NotOurs);
    }
    if is_bound(ctx, ipv6) {
        return Err(Miss::Bound);
    }
    let (index, table) = table(*route).ok_or(Miss::NoTarget)?;
    let of_route = state(&TargetKey::of_route(table.route)).ok_or(Miss::NoRoom)?;
    // SAFETY: elements of routes stay while their tables are in force, and until hooks that saw those have ended.
    let Target { active, pending, chosen: turn, .. } = unsafe { *of_route };
    let carried = CARRIED.get(*route).copied().unwrap_or_default();
    if active + u64::from(carried.active) >= u64::from(table.limit)
        || pending + u64::from(carried.pending) >= u64::from(table.pending_limit)
    {
        return Err(Miss::NoTarget);
    }
    let families = match ipv6 {
        false => IPV4,
        true if original.as_v4().is_some() || takes_v4(ctx) => IPV4 | IPV6,
        true => IPV6,
    };
    let wish = Wish { table: index, families, now, turn };
    let slot = match choose(table, &wish) {
        // A listener could have tried one address after the other, but it is gone.
        None if !is_listened_at(ctx, &original) => whatever_it_is(table, &wish),
        chosen => chosen,
    };
    let slot = slot.ok_or(Miss::NoTarget)?;
    if is_full(table, slot) {
        return Err(Miss::NoTarget);
    }
    // Made now, because the lifecycle only counts in what is there.
    state(&slot.key).ok_or(Miss::NoRoom)?;
    let mut flow = Flow {
        key: slot.key,
        started: now,
        established: 0,
        received_before_fin: 0,
        original,
        counted: 0,
        local: Address::v4(0, 0),
        reserved: 0,
    };
    // SAFETY: the socket of the context lives as long as the program runs.
    let stored = unsafe { REDIRECTED.get_or_insert_ptr_mut(ctx, Some(&mut flow)) };
    // SAFETY: nobody else refers to the storage of a socket that is being connected.
    let stored = unsafe { stored.as_mut() }.ok_or(Miss::NoRoom)?;
    *stored = flow;
    // SAFETY: a field of a live element.
    counter::add(unsafe { &raw mut (*of_route).chosen }, 1);
    Ok(&slot.key.address)
}

/// Whether anybody would take a connection to this address.
#[inline(always)]
fn is_listened_at(ctx: &SockAddrContext, address: &Address) -> bool {
    let port = address.port as u16;
    let (tuple, size) = match address.as_v4() {
        Some(daddr) => (
            Tuple { ipv4: TupleV4 { saddr: 0, daddr, sport: 0, dport: port } },
            size_of::<TupleV4>(),
        ),
        None => (
            Tuple { ipv6: TupleV6 { saddr: [0; 4], daddr: address.ip, sport: 0, dport: port } },
            size_of::<TupleV6>(),
        ),
    };
    let mut tuple = bpf_sock_tuple { __bindgen_anon_1: tuple };
    let current = BPF_F_CURRENT_NETNS as u64;
    // SAFETY: the context is the kernel's own, and the tuple is as large as said.
    let listener =
        unsafe { bpf_sk_lookup_tcp(ctx.as_ptr(), &raw mut tuple, size as u32, current, 0) };
    if listener.is_null() {
        return false;
    }
    // SAFETY: found above, and given back once.
    unsafe { bpf_sk_release(listener.cast()) };
    true
}

/// Whoever wonders why a connection took the long way is told.
#[inline(always)]
fn count(miss: &Miss) {
    let reason = match miss {
        Miss::NotOurs => return,
        Miss::Bound => BOUND,
        Miss::NoTarget => NO_TARGET,
        Miss::NoRoom => NO_ROOM,
    };
    if let Some(counter) = MISSES.get_ptr_mut(reason) {
        counter::add(counter, 1);
    }
}

#[inline(always)]
fn flow(ctx: &SockAddrContext) -> Option<&Flow> {
    // SAFETY: the socket of the context lives as long as the program runs.
    let flow = unsafe { REDIRECTED.get_ptr_mut(ctx) };
    // SAFETY: the storage lives as long as its socket.
    unsafe { flow.as_ref() }
}

/// The table of a route and its index, if one is in force.
#[inline(always)]
fn table<'t>(route: u32) -> Option<(u32, &'t Table)> {
    let in_force = *ROUTES.get(route)?;
    if in_force == NO_TABLE {
        return None;
    }
    Some((in_force, TABLES.get(in_force)?))
}

/// The state of a target, made if it is new.
#[inline(always)]
fn state(key: &TargetKey) -> Option<*mut Target> {
    if let Some(known) = TARGETS.get_ptr_mut(key) {
        return Some(known);
    }
    let new = Target {
        active: 0,
        chosen: 0,
        suspect_until: 0,
        untold: 0,
        doubt_until: 0,
        survived: 0,
        pending: 0,
    };
    // Another CPU may have been faster.
    let _: Result<(), i32> = TARGETS.insert(key, new, BPF_NOEXIST.into());
    TARGETS.get_ptr_mut(key)
}

/// Whether an address or a device has been chosen for this end. From a loopback address no upstream can
/// be reached; and the ambassador binds its own sockets to tell them from those of apps.
#[inline(always)]
fn is_bound(ctx: &SockAddrContext, ipv6: bool) -> bool {
    // SAFETY: the socket of the context lives as long as the program runs.
    let bpf_sock { bound_dev_if, src_ip4, src_ip6: [a, b, c, d], .. } = *unsafe { &*socket(ctx) };
    bound_dev_if != 0 || if ipv6 { a | b | c | d != 0 } else { src_ip4 != 0 }
}

/// Whether this is the first subflow of an MPTCP socket. The app has that, whose getpeername(2) no hook sees, and
/// which may get subflows that none sees either: user space carries it.
#[inline(always)]
fn is_multipath(ctx: &SockAddrContext) -> bool {
    // SAFETY: read as a variable, because user space sets it while loading.
    let offset = unsafe { core::ptr::read_volatile(&raw const MULTIPATH) };
    if offset == 0 {
        return false;
    }
    // SAFETY: the socket of the context lives as long as the program runs. With the offset unknown the
    // verifier sees that this is never called: it takes CAP_PERFMON.
    let sk = unsafe { bpf_skc_to_tcp_sock(socket(ctx).cast()) };
    if sk.is_null() {
        return false;
    }
    // SAFETY: the verifier checks the offset.
    let byte = unsafe { sk.cast::<u8>().add(offset as usize) };
    // SAFETY: see above.
    unsafe { *byte != 0 }
}

/// Whether this IPv6 socket can be connected to an IPv4 address.
#[inline(always)]
fn takes_v4(ctx: &SockAddrContext) -> bool {
    // SAFETY: read as a variable, because user space sets it while loading.
    let bit = unsafe { core::ptr::read_volatile(&raw const IPV6ONLY_BIT) };
    if bit == 0 {
        return false;
    }
    // SAFETY: the socket of the context lives as long as the program runs. With the bit unknown the
    // verifier sees that this is never called: it takes CAP_PERFMON.
    let sk = unsafe { bpf_skc_to_tcp6_sock(socket(ctx).cast()) };
    if sk.is_null() {
        return false;
    }
    // SAFETY: a `tcp6_sock` begins with a `sock_common`, and the verifier checks the offset.
    let byte = unsafe { sk.cast::<u8>().add((bit / 8) as usize) };
    // SAFETY: see above.
    let byte = unsafe { *byte };
    byte >> (bit % 8) & 1 == 0
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: the field is valid in every program on an address.
    unsafe { asked(ctx).__bindgen_anon_1.sk }
}

/// What the app asked for.
#[inline(always)]
fn asked(ctx: &SockAddrContext) -> &bpf_sock_addr {
    // SAFETY: the kernel hands in a context that lives as long as the program runs.
    unsafe { &*ctx.sock_addr }
}

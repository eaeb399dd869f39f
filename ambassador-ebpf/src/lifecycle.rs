//! The life of redirected connections: counted while they are open, told when they end.
//!
//! - program: `sock_ops`, attached to the pod's cgroup
//! - kernel: 5.10 (socket storage in sock_ops)
//! - maps: `REDIRECTED` (read, write), `TARGETS` (count), `OPEN` (make, delete), `ENDS` (write)
//! - byte order: the local address is stored in network order; the kernel hands the local port in host
//!   order
//! - on failure: an event goes uncounted or untold. The program sets nothing but its own subscriptions,
//!   writes no reply and always returns 1, so connections are never altered.
//!
//! Sockets that were not redirected cost one look at their storage when they connect, and nothing later.

use ambassador_ebpf::Address;
use ambassador_ebpf::direct::{
    DOUBT_NS, End, Flow, IN_ORDER, NEVER_ESTABLISHED, PATIENCE_NS, RESET, RESET_BY_APP,
    RESET_BY_TARGET, SURVIVALS, SUSPICION_NS, TARGET_LOST, Target, TargetKey,
};
use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_ANY, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_RTO_CB_FLAG,
    BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE,
    BPF_TCP_CLOSE_WAIT, BPF_TCP_CLOSING, BPF_TCP_ESTABLISHED, BPF_TCP_FIN_WAIT1, BPF_TCP_FIN_WAIT2,
    BPF_TCP_LAST_ACK, BPF_TCP_SYN_SENT, bpf_sock_ops,
};
use aya_ebpf::helpers::{bpf_get_socket_cookie, bpf_skc_to_tcp_sock};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use aya_log_ebpf::warn;

use crate::clock::now;
use crate::context::{event_socket, event_storage, event_tuple};
use crate::counter;
use crate::maps::{ENDS, OPEN, REDIRECTED, TARGETS};
use crate::rarely::rarely;

/// See [`ambassador_ebpf::direct::SOCKET_ERROR`].
#[unsafe(no_mangle)]
static SOCKET_ERROR: u32 = 0;

/// The same on all architectures that there are programs for.
const ECONNABORTED: u32 = 103;

/// The states that a connection is counted in ([`Flow::counted`]).
const OF_ADDRESS: u32 = 1;
const OF_ROUTE: u32 = 2;
const EVERYWHERE: u32 = OF_ADDRESS | OF_ROUTE;

/// What the kernel expects of a sock_ops program that has no reply to give.
const OK: u32 = 1;

/// One event of one connection.
#[sock_ops]
pub(crate) fn lifecycle(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => begin(&ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => establish(&ctx),
        BPF_SOCK_OPS_RTO_CB => notice_silence(&ctx),
        BPF_SOCK_OPS_STATE_CB => match (ctx.arg(0), ctx.arg(1)) {
            (from, BPF_TCP_CLOSE) => end(&ctx, from),
            (_, BPF_TCP_FIN_WAIT2) => await_fin(&ctx),
            (BPF_TCP_ESTABLISHED, BPF_TCP_CLOSE_WAIT) => {
                flow(&ctx).and_then(|flow| doubt(&flow.key))
            }
            _ => Some(()),
        },
        _ => Some(()),
    };
    // What was missed leaves the connection as it is; there is nobody to tell.
    OK
}

/// The first packet is about to be sent.
#[inline(always)]
fn begin(ctx: &SockOpsContext) -> Option<()> {
    let flow = flow(ctx)?;
    let flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG;
    // Without its end it must not be counted as open.
    ctx.set_cb_flags(flags.cast_signed()).ok()?;
    flow.counted = count(flow, EVERYWHERE, 1, 1);
    Some(())
}

#[inline(always)]
fn establish(ctx: &SockOpsContext) -> Option<()> {
    let flow = flow(ctx)?;
    flow.established = now();
    count(flow, flow.counted, 0, -1);
    flow.local = local(ctx)?;
    if let Some(target) = TARGETS.get_ptr_mut(flow.key) {
        clear(target);
    }
    // SAFETY: the context is the kernel's own.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let listed: &Flow = flow;
    let inserted = OPEN.insert(cookie, listed, BPF_ANY.into());
    if inserted.is_err() && rarely() {
        warn!(ctx, "a connection is not listed: there are too many, or too little memory");
    }
    inserted.ok()
}

/// A packet was sent again. If it was the first one, the target does not answer; of one that has answered
/// before it is not certain.
#[inline(always)]
fn notice_silence(ctx: &SockOpsContext) -> Option<()> {
    match ops(ctx).state {
        BPF_TCP_SYN_SENT => suspect(&flow(ctx)?.key),
        BPF_TCP_ESTABLISHED => doubt(&flow(ctx)?.key),
        _ => Some(()),
    }
}

/// From here on only the peer's FIN can come, if that is all it still has to say.
#[inline(always)]
fn await_fin(ctx: &SockOpsContext) -> Option<()> {
    flow(ctx)?.received_before_fin = ops(ctx).bytes_received;
    Some(())
}

#[inline(always)]
fn end(ctx: &SockOpsContext, from: u32) -> Option<()> {
    let flow = flow(ctx)?;
    if flow.counted == 0 {
        return None;
    }
    count(flow, flow.counted, -1, if flow.established == 0 { -1 } else { 0 });
    flow.counted = 0;
    // SAFETY: the context is the kernel's own.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let _: Result<(), i32> = OPEN.remove(cookie);
    let outcome = outcome(ctx, from, flow.started);
    match outcome {
        NEVER_ESTABLISHED => suspect(&flow.key),
        RESET_BY_TARGET => doubt(&flow.key),
        _ => None,
    };
    if from == BPF_TCP_SYN_SENT {
        flow.local = local(ctx)?;
    }
    let Some(mut told) = ENDS.reserve::<End>(0) else {
        let of_route = TARGETS.get_ptr_mut(TargetKey::of_route(flow.key.route))?;
        // SAFETY: a field of a live element.
        counter::add(unsafe { &raw mut (*of_route).untold }, 1);
        return None;
    };
    let (bytes_up, bytes_down) = bytes(ctx, flow, from);
    told.write(End {
        flow: *flow,
        cookie,
        ended: now(),
        bytes_up,
        bytes_down,
        // The kernel keeps it in eighths.
        rtt_us: ops(ctx).srtt_us >> 3,
        retransmits: ops(ctx).total_retrans,
        outcome,
        reserved: 0,
    });
    told.submit(0);
    Some(())
}

/// What the state that a connection ends in tells: whoever has not said a last byte has given up, or
/// been given up.
#[inline(always)]
fn outcome(ctx: &SockOpsContext, from: u32, started: u64) -> u32 {
    match from {
        BPF_TCP_SYN_SENT => match error(ctx) {
            // An app may have changed its mind. One that has waited for so long had reason to.
            Some(0) if now().saturating_sub(started) < PATIENCE_NS => RESET_BY_APP,
            _ => NEVER_ESTABLISHED,
        },
        BPF_TCP_CLOSING | BPF_TCP_LAST_ACK => IN_ORDER,
        _ => match error(ctx) {
            // The peer's FIN, as a rule. What ends it otherwise leaves an error.
            None | Some(0) if from == BPF_TCP_FIN_WAIT2 => IN_ORDER,
            None => RESET,
            // What an app does itself is noted after this, if at all (net/ipv4/tcp.c: `tcp_disconnect`).
            Some(0) => RESET_BY_APP,
            // Of SOCK_DESTROY (net/ipv4/tcp.c: `tcp_abort`).
            Some(ECONNABORTED) => TARGET_LOST,
            Some(_) => RESET_BY_TARGET,
        },
    }
}

/// The error that the network has brought upon the socket, if that may be known.
#[inline(always)]
fn error(ctx: &SockOpsContext) -> Option<u32> {
    // SAFETY: read as a variable, because user space sets it while loading.
    let offset = unsafe { core::ptr::read_volatile(&raw const SOCKET_ERROR) };
    if offset == 0 {
        return None;
    }
    let socket = event_socket(ctx);
    if socket.is_null() {
        return None;
    }
    // SAFETY: the socket of the event is alive. With the offset unknown the verifier sees that this is
    // never called: it takes CAP_PERFMON.
    let socket = unsafe { bpf_skc_to_tcp_sock(socket.cast()) };
    if socket.is_null() {
        return None;
    }
    // SAFETY: the verifier checks the offset.
    let error = unsafe { socket.cast::<u8>().add(offset as usize) };
    // SAFETY: see above.
    Some(unsafe { *error.cast::<u32>() })
}

/// The bytes of the stream each way. The kernel counts sequence numbers, of which SYN and FIN take one
/// each (net/ipv4/tcp_input.c: `tcp_snd_una_update`, `tcp_rcv_nxt_update`).
#[inline(always)]
fn bytes(ctx: &SockOpsContext, flow: &Flow, from: u32) -> (u64, u64) {
    let bpf_sock_ops { bytes_acked, bytes_received, snd_una, snd_nxt, .. } = *ops(ctx);
    let said_fin =
        matches!(from, BPF_TCP_FIN_WAIT1 | BPF_TCP_FIN_WAIT2 | BPF_TCP_CLOSING | BPF_TCP_LAST_ACK);
    let syn = u64::from(flow.established != 0);
    let fin = u64::from(said_fin && snd_una == snd_nxt);
    let heard_fin = match from {
        // An app that has closed need not wait for it.
        BPF_TCP_FIN_WAIT2 => bytes_received > flow.received_before_fin,
        _ => from == BPF_TCP_CLOSING || from == BPF_TCP_LAST_ACK || from == BPF_TCP_CLOSE_WAIT,
    };
    (bytes_acked.saturating_sub(syn + fin), bytes_received.saturating_sub(heard_fin.into()))
}

#[inline(always)]
fn suspect(key: &TargetKey) -> Option<()> {
    let target = TARGETS.get_ptr_mut(key)?;
    // SAFETY: a live element; whoever writes last has the newest word on it.
    unsafe { (*target).suspect_until = now() + SUSPICION_NS };
    // SAFETY: see above.
    unsafe { (*target).survived = 0 };
    Some(())
}

/// The target has ended a connection, or is silent on one, as when it goes or has gone, and at many other
/// times.
#[inline(always)]
fn doubt(key: &TargetKey) -> Option<()> {
    let target = TARGETS.get_ptr_mut(key)?;
    // SAFETY: a field of a live element.
    if unsafe { (*target).survived } < SURVIVALS {
        // SAFETY: a live element; whoever writes last has the newest word on it.
        unsafe { (*target).doubt_until = now() + DOUBT_NS };
    }
    Some(())
}

/// The target can be connected to, whatever it has done before.
#[inline(always)]
fn clear(target: *mut Target) {
    // SAFETY: a live element; whoever writes last has the newest word on it.
    unsafe { (*target).suspect_until = 0 };
    // SAFETY: a field of a live element.
    if unsafe { (*target).doubt_until } != 0 {
        // SAFETY: see above.
        unsafe { (*target).doubt_until = 0 };
        // SAFETY: see above.
        counter::add(unsafe { &raw mut (*target).survived }, 1);
    }
}

/// Counts a connection in these of the states that there are, and says in which: one that has been given up
/// and is made anew meanwhile must not lose a connection that it never had.
#[inline(always)]
fn count(flow: &Flow, states: u32, active: i64, pending: i64) -> u32 {
    let mut counted = 0;
    for (bit, key) in [(OF_ADDRESS, flow.key), (OF_ROUTE, TargetKey::of_route(flow.key.route))] {
        if states & bit != 0
            && let Some(target) = TARGETS.get_ptr_mut(key)
        {
            let target: *mut Target = target;
            counted |= bit;
            // SAFETY: a field of a live element.
            counter::add(unsafe { &raw mut (*target).active }, active);
            // SAFETY: see above.
            counter::add(unsafe { &raw mut (*target).pending }, pending);
        }
    }
    counted
}

/// The app's end of the connection.
#[inline(always)]
fn local(ctx: &SockOpsContext) -> Option<Address> {
    let tuple = event_tuple(ctx)?;
    Some(Address { ip: tuple.client, port: (tuple.client_port as u16).to_be().into() })
}

#[inline(always)]
#[expect(clippy::mut_from_ref, reason = "the storage does not lie in the context")]
fn flow(ctx: &SockOpsContext) -> Option<&mut Flow> {
    // SAFETY: the storage lives as long as its socket, whose lock is held.
    event_storage(ctx, &REDIRECTED).map(|mut flow| unsafe { flow.as_mut() })
}

#[inline(always)]
fn ops(ctx: &SockOpsContext) -> &bpf_sock_ops {
    // SAFETY: the kernel hands in a context that lives as long as the program runs.
    unsafe { &*ctx.ops }
}

//! Enrols the sockets of clients, follows what upstreams acknowledge, and has an app that is faster than its upstream
//! wait for it.
//!
//! - program: `sock_ops`, attached to a cgroup; stands beside `lifecycle` and the programs of others
//! - kernel: 5.15 (`bpf_get_netns_cookie` here)
//! - maps: `SETTINGS`, `ENROL_LISTENERS`, `UPLINK_TAGS`, `FLOWS`, `ORDERS` (read); `CLIENT_SOCKETS`, `ENROLLED`, `ALLOWANCE`
//!   (write); `PROGRESS` (both)
//! - byte order: as in `uplink`
//! - on failure: a socket that is not enrolled stays as it is, and its bytes take the relay; an
//!   acknowledgement that is missed makes the upstream's socket look fuller than it is; a client whose backlog
//!   is not limited takes the relay for longer. The program sets nothing but its own subscription and that limit,
//!   writes no reply and always returns 1.

use ambassador_ebpf::sockmap::{ANY_CLIENT, ListenerKey, place};
use aya_ebpf::bindings::{
    BPF_ANY, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTT_CB, BPF_SOCK_OPS_RTT_CB_FLAG,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_getsockopt, bpf_setsockopt};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;

use crate::allowance;
use crate::clock;
use crate::context::{event_socket, event_storage, event_tuple};
use crate::maps::SETTINGS;
use crate::maps::sockmap::{
    CLIENT_SOCKETS, ENROL_LISTENERS, ENROLLED, FLOWS, ORDERS, PROGRESS, UPLINK_TAGS,
};
use crate::tcp::TcpSocket;
use crate::volatile;

/// What the kernel expects of a sock_ops program that has no reply to give.
const OK: u32 = 1;
/// Of include/uapi/linux/in.h and tcp.h.
const IPPROTO_TCP: i32 = 6;
const TCP_NOTSENT_LOWAT: i32 = 25;
/// What a client's socket may hold beyond what is on its way to us: 64 KiB, but a number that no app is likely to ask
/// for, so that ours is known again.
const BACKLOG: u32 = 64 * 1024 - 3;

/// Why an event changed nothing.
enum Miss {
    /// Not an event this program is for.
    Event,
    /// Neither a client of a listener nor a socket of ours.
    Stranger,
    /// The ambassador that listened there has ended, or is about to.
    Stale,
    /// A client whose app would notice.
    Unfit,
    /// A map is full, or the kernel refused.
    Refused,
    /// Too many clients come and go.
    TooMany,
}

/// Looks at one event of one connection.
#[sock_ops]
pub(crate) fn enrol(ctx: SockOpsContext) -> u32 {
    // A miss leaves the connection as it is; there is nobody to tell.
    let _: Result<(), Miss> = try_enrol(&ctx);
    OK
}

fn try_enrol(ctx: &SockOpsContext) -> Result<(), Miss> {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => match flow_of(ctx) {
            Ok(_) => follow(ctx),
            Err(_) => enrol_client(ctx),
        },
        BPF_SOCK_OPS_RTT_CB => match flow_of(ctx) {
            Ok(id) => note_acknowledged(ctx, id),
            Err(_) => limit_backlog(ctx),
        },
        _ => Err(Miss::Event),
    }
}

/// Puts the socket of a client where its messages are looked at.
fn enrol_client(ctx: &SockOpsContext) -> Result<(), Miss> {
    let tuple = event_tuple(ctx).ok_or(Miss::Stranger)?;
    let listener = ListenerKey {
        // SAFETY: the helper takes this context.
        netns: unsafe { bpf_get_netns_cookie(ctx.ops.cast()) },
        address: tuple.listener,
        port: tuple.listener_port,
        _zero: 0,
    };
    // SAFETY: the flags are copied at once; a listener's never change.
    let flags = unsafe { ENROL_LISTENERS.get(listener) }.copied().ok_or(Miss::Stranger)?;
    if SETTINGS.get(0).is_none_or(|settings| clock::now() >= settings.fresh_until) {
        return Err(Miss::Stale);
    }
    let socket = TcpSocket::of(event_socket(ctx)).ok_or(Miss::Stranger)?;
    if flags & ANY_CLIENT == 0 && !socket.is_fit() {
        return Err(Miss::Unfit);
    }
    if !allowance::take() {
        return Err(Miss::TooMany);
    }
    // SAFETY: the context is alive, and nothing else refers to it during the call.
    let event = unsafe { &mut *ctx.ops };
    CLIENT_SOCKETS.update(tuple, event, BPF_ANY.into()).map_err(|_| Miss::Refused)?;
    ENROLLED.insert(tuple, flags, BPF_ANY.into()).map_err(|_| Miss::Refused)?;
    follow(ctx)
}

/// Asks for a socket's acknowledgements, beside whatever others asked for.
fn follow(ctx: &SockOpsContext) -> Result<(), Miss> {
    let flags = ctx.cb_flags() | BPF_SOCK_OPS_RTT_CB_FLAG;
    ctx.set_cb_flags(flags.cast_signed()).map_err(|_| Miss::Refused)
}

fn note_acknowledged(ctx: &SockOpsContext, id: u64) -> Result<(), Miss> {
    let orders = ORDERS.get(place(id)).ok_or(Miss::Stranger)?;
    if id == 0 || volatile::read(&orders.id) != id {
        return Err(Miss::Stranger);
    }
    let progress = PROGRESS.get_ptr_mut(place(id)).ok_or(Miss::Stranger)?;
    // SAFETY: the context is alive, and this is one of its fields.
    let acked = unsafe { (*ctx.ops).bytes_acked };
    // SAFETY: this line is written here only, under the lock of the flow's one upstream socket.
    let received = unsafe { &mut (*progress).received };
    received.acked = acked;
    let socket = TcpSocket::of(event_socket(ctx)).ok_or(Miss::Stranger)?;
    received.buffer = socket.send_buffer();
    Ok(())
}

/// Something that a client sent has taken the native way. All that did must be forwarded before anything may take
/// the shortcut again; but a loopback socket takes megabytes from its app, and an app that is faster than its upstream
/// fills them up again before the relay has done with them. So that of a client with large messages takes little
/// ahead of time, unless the app has a limit of its own.
///
/// Small messages are left alone: those of several threads would be torn where the limit is met, and before that
/// megabytes later, if ever.
fn limit_backlog(ctx: &SockOpsContext) -> Result<(), Miss> {
    let tuple = event_tuple(ctx).ok_or(Miss::Stranger)?;
    // SAFETY: the id is copied at once, and below it is held against orders.
    let id = unsafe { FLOWS.get(tuple) }.copied().ok_or(Miss::Stranger)?;
    let orders = ORDERS.get(place(id)).ok_or(Miss::Stranger)?;
    let progress = PROGRESS.get(place(id)).ok_or(Miss::Stranger)?;
    if volatile::read(&progress.sent.has_large) == 0 {
        return Ok(());
    }
    let socket = TcpSocket::of(event_socket(ctx)).ok_or(Miss::Stranger)?;
    let is_limited = volatile::read(&orders.armed) == id
        && (volatile::read(&orders.flags) & ANY_CLIENT != 0 || socket.is_fit());
    let mut wanted = if is_limited { BACKLOG } else { 0 };

    let (mut limit, size) = (0_u32, size_of::<u32>() as i32);
    let value = (&raw mut limit).cast();
    // SAFETY: the helper takes this context, and writes that many bytes.
    let asked =
        unsafe { bpf_getsockopt(ctx.ops.cast(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, value, size) };
    // Before Linux 6.1 it cannot be asked whose limit it is.
    if asked != 0 {
        return Err(Miss::Refused);
    }
    if limit != wanted && matches!(limit, 0 | BACKLOG) {
        let value = (&raw mut wanted).cast();
        // SAFETY: the helper takes this context, and reads that many bytes.
        unsafe { bpf_setsockopt(ctx.ops.cast(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, value, size) };
    }
    Ok(())
}

/// The flow of a socket of ours to an upstream: 0 if it has none yet.
fn flow_of(ctx: &SockOpsContext) -> Result<u64, Miss> {
    let tag = event_storage(ctx, &UPLINK_TAGS).ok_or(Miss::Stranger)?;
    // SAFETY: what the helper found is the map's value.
    Ok(unsafe { tag.read_volatile() })
}

//! The way up: what a client sends goes straight to the socket of its upstream, while it may.
//!
//! - program: `sk_msg`, attached to the socket hash `CLIENT_SOCKETS`
//! - kernel: 5.15 (as `enrol`, without which no socket gets here)
//! - maps: `FLOWS`, `ORDERS` (read), `UPLINK_SOCKETS` (redirect), `PROGRESS`, `ENROLLED`,
//!   `ALLOWANCE` (write)
//! - byte order: addresses stay in network order; `remote_port` comes in network order, in the upper
//!   half of the word on little-endian machines, and leaves in that of the machine
//! - on failure: the message takes its native way to the ambassador, which forwards it. The program
//!   never drops one: where a redirect is not possible, the helper's verdict is not returned.
//!
//! A byte may be redirected only if the upstream's socket has accepted every earlier byte of the client.
//! The client's socket is locked here, so nothing in this file depends on timing.

use ambassador_ebpf::sockmap::{
    ANY_CLIENT, CHECKPOINTS, HAS_SPOKEN, LARGE_MESSAGE, Orders, SHARE_OF_BYTES, STAYS, Sent,
    TURNED_UNFIT, Tuple, place,
};
use aya_ebpf::bindings::sk_action::SK_PASS;
use aya_ebpf::helpers::generated::bpf_msg_pull_data;
use aya_ebpf::macros::sk_msg;
use aya_ebpf::programs::SkMsgContext;

use crate::allowance;
use crate::context::{message_socket, message_tuple};
use crate::maps::sockmap::{ENROLLED, FLOWS, ORDERS, PROGRESS, UPLINK_SOCKETS};
use crate::tcp::TcpSocket;
use crate::volatile;

/// Why a message takes its native way.
enum Pass {
    /// The client has no flow, or that is not armed.
    NotArmed,
    /// The socket has become one whose app would notice.
    Unfit,
    /// Not all that took the native way before has been forwarded.
    NotLatched,
    /// The upstream's socket holds as much as it may.
    OverBudget,
    /// The upstream's socket has gone.
    NoUpstream,
}

/// Decides on one message.
#[sk_msg]
pub(crate) fn uplink(ctx: SkMsgContext) -> u32 {
    // The verdict is the same either way: the helper has noted where a redirected message goes.
    if try_uplink(&ctx).is_err() {
        keep_whole(&ctx);
    }
    SK_PASS
}

/// Has a message that takes its native way sent in one piece, if it may be one of MSG_ZEROCOPY. The kernel
/// completes every piece, apps count completions, and one too many would let them write into what is still
/// to be sent. The pieces are copies, so none at all does no harm.
fn keep_whole(ctx: &SkMsgContext) {
    if let Some(socket) = TcpSocket::of(message_socket(ctx))
        && socket.wants_completions()
    {
        // SAFETY: the context is alive, and nothing refers to the message's bytes.
        unsafe { bpf_msg_pull_data(ctx.msg, 0, ctx.size(), 0) };
    }
}

fn try_uplink(ctx: &SkMsgContext) -> Result<(), Pass> {
    let tuple = message_tuple(ctx).ok_or(Pass::NotArmed)?;
    // SAFETY: the id is copied at once, and below it is held against orders that change hands only
    // while they are not armed.
    let Some(id) = unsafe { FLOWS.get(tuple) }.copied() else {
        return Err(wait_for_a_flow(ctx, &tuple));
    };
    let orders = ORDERS.get(place(id)).ok_or(Pass::NotArmed)?;
    if id == 0 || volatile::read(&orders.armed) != id || !is_of(orders, &tuple) {
        return Err(Pass::NotArmed);
    }
    let progress = PROGRESS.get_ptr_mut(place(id)).ok_or(Pass::NotArmed)?;
    // SAFETY: these lines are written here only, under the lock of the flow's one client socket.
    let sent = unsafe { &mut (*progress).sent };
    // SAFETY: the pointer is that of a living element.
    let received = unsafe { &(*progress).received };
    let (acked, buffer) = (volatile::read(&received.acked), volatile::read(&received.buffer));
    let socket = TcpSocket::of(message_socket(ctx)).ok_or(Pass::NotArmed)?;

    if volatile::read(&orders.flags) & ANY_CLIENT == 0 && !socket.is_fit() {
        sent.unfit = 1;
        return Err(Pass::Unfit);
    }
    let forwarded = volatile::read(&orders.forwarded);
    let length = u64::from(ctx.size());
    if length >= LARGE_MESSAGE {
        sent.has_large = 1;
    }
    if socket.bytes_sent() != forwarded {
        return Err(Pass::NotLatched);
    }
    let end = sent.redirected + forwarded + length;
    // Nothing is known of acknowledgements before the first one.
    let acked = acked.saturating_sub(volatile::read(&orders.base));
    let budget = volatile::read(&orders.budget).min(buffer / SHARE_OF_BYTES);
    if end - acked > budget {
        return Err(Pass::OverBudget);
    }
    let checkpoint = checkpoint(sent, volatile::read(&orders.stride), acked)?;
    if UPLINK_SOCKETS.redirect_msg(ctx, id, 0) != i64::from(SK_PASS) {
        return Err(Pass::NoUpstream);
    }
    // Counted before the bytes move, so that user space never forwards later ones ahead of them.
    sent.redirected += length;
    sent.messages += 1;
    if let Some(slot) = sent.checkpoints.get_mut(checkpoint) {
        *slot = end;
    }
    Ok(())
}

/// While user space has not opened a flow: notes whether it is worth one, and if it should get none, because
/// the app would notice.
fn wait_for_a_flow(ctx: &SkMsgContext, tuple: &Tuple) -> Pass {
    let Some(flags) = ENROLLED.get_ptr_mut(tuple) else { return Pass::NotArmed };
    let Some(socket) = TcpSocket::of(message_socket(ctx)) else { return Pass::NotArmed };
    // SAFETY: until a flow takes the client up, nobody else writes its flags.
    let flags = unsafe { &mut *flags };
    if *flags & (HAS_SPOKEN | STAYS) == HAS_SPOKEN {
        *flags |= STAYS;
        allowance::give_back();
    }
    *flags |= HAS_SPOKEN;
    if *flags & ANY_CLIENT != 0 || socket.is_fit() {
        return Pass::NotArmed;
    }
    *flags |= TURNED_UNFIT;
    Pass::Unfit
}

/// The slot to note this message in, or none (`usize::MAX`) between two strides.
///
/// Each message costs the upstream's socket memory beside its bytes. The slot to be written over is that
/// of the message [`CHECKPOINTS`] strides ago, which must have been acknowledged.
fn checkpoint(sent: &Sent, stride: u64, acked: u64) -> Result<usize, Pass> {
    if stride == 0 || !sent.messages.is_multiple_of(stride) {
        return Ok(usize::MAX);
    }
    let slot = (sent.messages / stride % CHECKPOINTS) as usize;
    match sent.checkpoints.get(slot) {
        Some(&end) if end > acked => Err(Pass::OverBudget),
        _ => Ok(slot),
    }
}

fn is_of(orders: &Orders, tuple: &Tuple) -> bool {
    volatile::read(&orders.tuple) == *tuple
}

//! The life of connections, as the sockets of a cgroup report it.
//!
//! - program: `sock_ops`, attached to a cgroup
//! - kernel: 4.16 (state callbacks); links since 5.7
//! - maps: `CONNECTIONS` (add)
//! - byte order: no address or port is read
//! - on failure: an event goes uncounted. The program sets nothing but its own subscription to
//!   state changes, writes no reply and always returns 1, so connections are never altered.

use core::arch::asm;
use core::mem::offset_of;

use ambassador_ebpf::ConnectionCounts;
use aya_ebpf::bindings::{
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
    BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, BPF_TCP_SYN_SENT,
};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;

use crate::maps::CONNECTIONS;

/// What the kernel expects of a sock_ops program that has no reply to give.
const OK: u32 = 1;

/// Why an event was not counted.
enum Miss {
    /// The kernel refused the subscription to state changes.
    Unsubscribed,
    /// The map has no element for this CPU.
    NoCounts,
}

/// Counts one event of one connection.
#[sock_ops]
pub(crate) fn tracker(ctx: SockOpsContext) -> u32 {
    // A miss leaves the connection as it is; there is nobody to tell.
    let _: Result<(), Miss> = try_tracker(&ctx);
    OK
}

fn try_tracker(ctx: &SockOpsContext) -> Result<(), Miss> {
    match ctx.op() {
        // Subscribed before the handshake, so that its failure is reported too.
        BPF_SOCK_OPS_TCP_CONNECT_CB => subscribe(ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => {
            count(offset_of!(ConnectionCounts, opened))?;
            subscribe(ctx)
        }
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            count(offset_of!(ConnectionCounts, accepted))?;
            subscribe(ctx)
        }
        BPF_SOCK_OPS_STATE_CB => match (ctx.arg(0), ctx.arg(1)) {
            (BPF_TCP_SYN_SENT, BPF_TCP_CLOSE) => count(offset_of!(ConnectionCounts, failed)),
            (_, BPF_TCP_CLOSE) => count(offset_of!(ConnectionCounts, closed)),
            _ => Ok(()),
        },
        _ => Ok(()),
    }
}

/// Asks for the state changes of this connection, beside whatever others asked for.
fn subscribe(ctx: &SockOpsContext) -> Result<(), Miss> {
    let flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG;
    ctx.set_cb_flags(flags.cast_signed()).map_err(|_| Miss::Unsubscribed)
}

/// Adds one to the field of this CPU's counts at an offset.
fn count(field: usize) -> Result<(), Miss> {
    let counts = CONNECTIONS.get_ptr_mut(0).ok_or(Miss::NoCounts)?;
    let counter = counts.cast::<u64>().wrapping_byte_add(field);
    // A packet may interrupt a system call between the load and the store of a plain addition,
    // on the same CPU, and its event would be lost. The target has no atomic types.
    //
    // SAFETY: the pointer is this CPU's element, alive as long as the map, and the offset that of
    // an aligned `u64` in it; nothing else in the program holds a reference to it.
    unsafe {
        asm!(
            "lock *(u64 *)({counter} + 0) += {one}",
            counter = in(reg) counter,
            one = in(reg) 1_u64,
            options(nostack),
        );
    }
    Ok(())
}

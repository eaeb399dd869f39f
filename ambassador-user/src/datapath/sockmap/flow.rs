//! One flow: a client (A), its accepted socket and its upstream's socket (C), from the moment A's bytes
//! may go straight to C until the last of the three is gone.
//!
//! The account: what C has accepted equals what the programs redirected and the relay forwarded. It is
//! read so that a race can only make C's side look smaller, that is, later and never earlier.

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use ambassador_ebpf::sockmap::{CHECKPOINTS, MOST_FLOWS, Orders, Progress, Tuple, id, place};
use anyhow::{Context, Result, bail};
use socket2::SockRef;
use tracing::warn;

use super::Kernel;
use super::shared::Shared;
use crate::proxy::shortcut::Shortcut;
use crate::proxy::socket::tcp_info;

/// What C's buffer should hold from the start, so that a redirected message never finds it full: the budget,
/// a few kilobytes of overhead for each message in flight, and room for what the relay forwards.
const SEND_BUFFER: libc::c_int = 4 * 1024 * 1024;
/// What the accepted socket holds of what takes the native way. It waits for what was redirected, and if it is much,
/// the relay does not catch up with an app that is faster than its upstream (see `enrol.rs`).
const RECEIVE_BUFFER: usize = 128 * 1024;
/// What a message may cost of C's buffer, beside its bytes.
const COST_OF_MESSAGE: u64 = 4096;
/// Of include/uapi/asm-generic/socket.h, and not of the libc crate.
const SO_BUF_LOCK: libc::c_int = 72;
/// BPF_EXIST: only if it is there.
const EXISTING: u64 = 2;
/// BPF_NOEXIST: only if nobody else has it.
const NEW: u64 = 1;

#[derive(Debug)]
pub(super) struct Flow {
    kernel: Arc<Kernel>,
    tuple: Tuple,
    id: u64,
    /// How many redirected bytes C is known to have accepted.
    settled: AtomicU64,
    /// Whether A is an ordinary socket again.
    handed_back: AtomicBool,
}

/// Ends all flows of a process that is no more.
pub(super) fn end_all(orders: &Shared) {
    for place in 0..MOST_FLOWS {
        orders.word(place, offset_of!(Orders, armed)).store(0, Ordering::Relaxed);
    }
}

impl Flow {
    /// Opens a flow, and arms it: from now on A's messages may be redirected. So many bytes of A are with C
    /// already.
    pub(super) fn open(
        kernel: &Arc<Kernel>,
        tuple: Tuple,
        flags: u64,
        client: BorrowedFd<'_>,
        upstream: BorrowedFd<'_>,
        forwarded: u64,
    ) -> Result<Self> {
        let Some(place) = kernel.take_place() else {
            if let Some(relayed) = kernel.full.say_now() {
                warn!(
                    relayed,
                    "{MOST_FLOWS} connections are in the kernel already, or were a second ago"
                );
            }
            bail!("every place is taken");
        };
        // The last id tells how often the place was taken. It stays when the flow has ended.
        let last = kernel.orders.word(place, offset_of!(Orders, id)).load(Ordering::Relaxed);
        let flow = Self {
            kernel: Arc::clone(kernel),
            tuple,
            id: id((last >> 32) + 1, place),
            settled: AtomicU64::new(0),
            handed_back: AtomicBool::new(false),
        };
        let narrowed = SockRef::from(&client).set_recv_buffer_size(RECEIVE_BUFFER);
        narrowed.context("narrow the receive buffer")?;
        flow.begin(flags, upstream, forwarded)?;
        Ok(flow)
    }

    fn begin(&self, flags: u64, upstream: BorrowedFd<'_>, forwarded: u64) -> Result<()> {
        if is_diverted(upstream) {
            self.kernel.diverted.call_once(|| {
                warn!(
                    "a sockmap of another program takes what is sent to upstreams: \
                     such connections keep to the relay"
                );
            });
            bail!("what is sent to the upstream goes through another program's sockmap");
        }
        // First, because it tells our sockets to upstreams from others. Until the orders bear this id,
        // nothing is followed.
        let marked = self.kernel.tables().tags.insert(&upstream, self.id, EXISTING);
        marked.context("mark the upstream's socket")?;
        let buffer = widen(upstream).context("widen the upstream's send buffer")?;
        let limits = self.kernel.limits;
        let messages = u64::from(limits.messages.get()).min(buffer / COST_OF_MESSAGE);
        let (accepted, acked) =
            accepted_exactly(upstream).context("ask what the upstream's socket has accepted")?;

        let progress = |field| self.kernel.progress.word(place(self.id), field);
        for word in 0..size_of::<Progress>() / size_of::<u64>() {
            progress(word * size_of::<u64>()).store(0, Ordering::Relaxed);
        }
        progress(offset_of!(Progress, received.acked)).store(acked, Ordering::Relaxed);
        progress(offset_of!(Progress, received.buffer)).store(buffer, Ordering::Relaxed);
        for (at, word) in words(&self.tuple).into_iter().enumerate() {
            self.order(at * size_of::<u64>()).store(word, Ordering::Relaxed);
        }
        self.order(offset_of!(Orders, flags)).store(flags, Ordering::Relaxed);
        self.order(offset_of!(Orders, stride)).store(messages / CHECKPOINTS, Ordering::Relaxed);
        self.order(offset_of!(Orders, forwarded)).store(forwarded, Ordering::Relaxed);
        self.order(offset_of!(Orders, base)).store(accepted - forwarded, Ordering::Relaxed);
        self.order(offset_of!(Orders, budget)).store(limits.bytes.get().into(), Ordering::Relaxed);
        self.order(offset_of!(Orders, id)).store(self.id, Ordering::Release);

        let mut tables = self.kernel.tables();
        tables.upstreams.insert(self.id, upstream.as_raw_fd(), NEW).context("add the upstream")?;
        tables.flows.insert(self.tuple, self.id, 0).context("add the flow")?;
        drop(tables);
        self.order(offset_of!(Orders, armed)).store(self.id, Ordering::Release);
        Ok(())
    }

    fn order(&self, field: usize) -> &AtomicU64 {
        self.kernel.orders.word(place(self.id), field)
    }

    fn progress(&self, field: usize) -> u64 {
        self.kernel.progress.word(place(self.id), field).load(Ordering::Acquire)
    }

    fn is_armed(&self) -> bool {
        self.order(offset_of!(Orders, armed)).load(Ordering::Relaxed) != 0
    }

    /// Makes A an ordinary socket again, once.
    fn hand_back(&self) {
        if !self.handed_back.swap(true, Ordering::Relaxed) {
            self.kernel.hand_back(&self.tuple);
        }
    }
}

impl Shortcut for Flow {
    fn carried(&self) -> u64 {
        self.progress(offset_of!(Progress, sent.redirected))
    }

    fn in_flight(&self) -> u64 {
        // First, so that what is acknowledged meanwhile is not taken for more than was sent.
        let acked = self.progress(offset_of!(Progress, received.acked));
        let order = |field| self.order(field).load(Ordering::Relaxed);
        let acked = acked.saturating_sub(order(offset_of!(Orders, base)));
        let redirected = self.carried();
        let unacknowledged =
            (redirected + order(offset_of!(Orders, forwarded))).saturating_sub(acked);
        // What the relay has forwarded counts for the budget, but is not held back by it.
        unacknowledged.min(redirected).min(order(offset_of!(Orders, budget)))
    }

    fn is_settled(&self, upstream: BorrowedFd<'_>) -> bool {
        if self.progress(offset_of!(Progress, sent.unfit)) != 0 {
            self.close();
        }
        let redirected = self.carried();
        if redirected != self.settled.load(Ordering::Relaxed) {
            let base = self.order(offset_of!(Orders, base)).load(Ordering::Relaxed);
            let forwarded = self.order(offset_of!(Orders, forwarded)).load(Ordering::Relaxed);
            // Where it cannot be asked, the connection has failed, and the relay will see how.
            if accepted(upstream).is_ok_and(|accepted| accepted < base + redirected + forwarded) {
                return false;
            }
            self.settled.store(redirected, Ordering::Relaxed);
        }
        if !self.is_armed() {
            self.hand_back();
        }
        true
    }

    fn forwarded(&self, bytes: u64) {
        self.order(offset_of!(Orders, forwarded)).store(bytes, Ordering::Release);
    }

    fn close(&self) {
        self.order(offset_of!(Orders, armed)).store(0, Ordering::Release);
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.close();
        let mut tables = self.kernel.tables();
        // It is not there if opening failed.
        let _ = tables.flows.remove(&self.tuple);
        tables.places.give_back(place(self.id), Instant::now());
    }
}

/// Makes C able to hold a budget; returns what its buffer holds, as the kernel counts it.
fn widen(upstream: BorrowedFd<'_>) -> io::Result<u64> {
    let set = |level, option, value: libc::c_int| {
        let length = size_of_val(&value) as libc::socklen_t;
        // SAFETY: the pointer and the length describe `value`, which the kernel only reads.
        let failed = unsafe {
            libc::setsockopt(upstream.as_raw_fd(), level, option, (&raw const value).cast(), length)
        };
        if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // As much as the system lets anybody ask for at once (net.core.wmem_max). From there the kernel lets it
    // grow with the path, as that of every socket that has asked for nothing (SO_BUF_LOCK, Linux 5.15), and
    // the budget grows with it.
    set(libc::SOL_SOCKET, libc::SO_SNDBUF, SEND_BUFFER)?;
    set(libc::SOL_SOCKET, SO_BUF_LOCK, 0)?;
    // A limit on what is not sent yet would turn redirected messages away though there is room.
    set(libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, libc::c_int::MAX)?;
    let size = SockRef::from(&upstream).send_buffer_size()?;
    Ok(size as u64)
}

/// Whether a program of a sockmap decides about what is sent on a socket. On C that is somebody else's, perhaps
/// that of another ambassador: what it takes elsewhere C never accepts, and it need not keep the order with what
/// is redirected to C.
///
/// Nothing tells, so it is tried: a message without bytes, with ancillary data that make no sense, is refused by TCP
/// (net/ipv4/tcp.c: `tcp_sendmsg_locked`), and never looked at where such a program would be asked about each
/// piece of it (net/ipv4/tcp_bpf.c: `tcp_bpf_sendmsg`). A socket that was reset in this instant may tell of it here,
/// and then no more: the relay knows that it cannot rely on being told.
pub(in crate::datapath) fn is_diverted(socket: BorrowedFd<'_>) -> bool {
    // Its length, which comes first, does not even cover itself.
    let mut nonsense = [0_u64; 2];
    // SAFETY: integers and pointers only, for which zeros are values.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_control = nonsense.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&nonsense) as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the message has no name and no bytes, and its ancillary data live as long as the call.
    unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) == 0 }
}

/// Bytes that C has ever accepted to be sent, its SYN counted as one. Acknowledgements that come in
/// between the two questions are missed: the answer may be too small, and never too large.
fn accepted(upstream: BorrowedFd<'_>) -> io::Result<u64> {
    let acknowledged = acknowledged(upstream)?;
    let mut queued: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, by its older name, writes an int.
    let failed = unsafe { libc::ioctl(upstream.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(acknowledged + u64::from(queued.unsigned_abs()))
}

/// The same, exactly, and how many of them are acknowledged: to count from.
fn accepted_exactly(upstream: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    loop {
        let before = acknowledged(upstream)?;
        let accepted = accepted(upstream)?;
        if acknowledged(upstream)? == before {
            return Ok((accepted, before));
        }
    }
}

fn acknowledged(upstream: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(tcp_info(upstream)?.tcpi_bytes_acked)
}

/// A tuple as it lies in shared memory.
fn words(tuple: &Tuple) -> [u64; 5] {
    let [a, b, c, d] = tuple.client;
    let [e, f, g, h] = tuple.listener;
    let pairs = [(a, b), (c, d), (e, f), (g, h), (tuple.client_port, tuple.listener_port)];
    pairs.map(|(first, second)| {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&first.to_ne_bytes());
        bytes[4..].copy_from_slice(&second.to_ne_bytes());
        u64::from_ne_bytes(bytes)
    })
}

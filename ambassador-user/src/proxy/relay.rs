//! The relay: both directions of a connection, moved until they end.
//!
//! What it owes is what a direct connection gives: every byte once and in order, an end of stream
//! passed on per direction, a reset passed on as a reset, and a slow reader that holds back its writer.

use std::future::poll_fn;
use std::io;
use std::os::fd::RawFd;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::task::coop::unconstrained;
use tokio::time::sleep;

use super::copy::Copy;
use super::shortcut::{Beside, Prospect, Shortcut};
use super::socket::{Pulled, Socket};
use super::splice::{Pipe, PipePool};

/// Bytes a direction moves before other connections get their turn.
const TURN: usize = 1024 * 1024;
/// What the smallest pull costs of a turn.
const LEAST_COST: usize = 8 * 1024;
/// Below this, copying is cheaper than a pipe's two calls.
const SMALL: usize = 16 * 1024;
/// Pulls in a row that are not small, after which a direction is busy enough for a pipe.
const LARGE_PULLS: u8 = 3;
/// Small pulls in a row after which it no longer is.
const SMALL_PULLS: u8 = 16;

/// Bytes moved so far; written by the relay, read by whoever reports.
#[derive(Debug, Default)]
pub struct Traffic {
    relayed_up: AtomicU64,
    relayed_down: AtomicU64,
    /// What carries, beside the relay, bytes of the client.
    pub shortcut: OnceLock<Arc<dyn Shortcut>>,
}

impl Traffic {
    pub fn up(&self) -> u64 {
        let carried = self.shortcut.get().map_or(0, |shortcut| shortcut.carried());
        self.relayed_up.load(Ordering::Relaxed) + carried
    }

    pub fn down(&self) -> u64 {
        self.relayed_down.load(Ordering::Relaxed)
    }

    pub fn total(&self) -> u64 {
        self.up().wrapping_add(self.down())
    }
}

/// Why a relay stopped before both directions had ended.
#[derive(Debug)]
pub enum Broken {
    Client(io::Error),
    Upstream(io::Error),
    Idle,
}

/// Relays until both directions have ended. Without `pipes` every byte is copied.
///
/// After `Ok` both sockets may simply be dropped: all that was read has been written, and closing
/// sends the last FIN. After `Err` the surviving side must be reset, or it would take a part for the
/// whole.
pub async fn relay(
    client: &Socket,
    upstream: &Socket,
    pipes: Option<&Arc<PipePool>>,
    prospect: Option<Prospect<'_>>,
    traffic: &Traffic,
    idle_timeout: Option<Duration>,
) -> Result<(), Broken> {
    // The relay limits its turns itself, and must know "not now" of the kernel from one of the runtime.
    let transfer = unconstrained(transfer(client, upstream, pipes, prospect, traffic));
    match idle_timeout {
        None => transfer.await,
        Some(timeout) => tokio::select! {
            biased;
            ended = transfer => ended,
            () = idle(traffic, timeout) => Err(Broken::Idle),
        },
    }
}

async fn transfer(
    client: &Socket,
    upstream: &Socket,
    pipes: Option<&Arc<PipePool>>,
    prospect: Option<Prospect<'_>>,
    traffic: &Traffic,
) -> Result<(), Broken> {
    let beside = Beside::new(&traffic.shortcut, prospect);
    let mut up = Direction::new(client, upstream, pipes, &traffic.relayed_up);
    up.beside = beside;
    let mut down = Direction::new(upstream, client, pipes, &traffic.relayed_down);
    down.against = up.beside.is_some().then_some(&traffic.shortcut);
    let (mut up, mut down) = (Way::Open(up), Way::Open(down));
    let mut client_failure = pin!(client.failed());
    let mut upstream_failure = pin!(upstream.failed());
    let (mut client_failed, mut upstream_failed) = (false, false);
    poll_fn(|cx| {
        // First, as `failed` asks for.
        client_failed = client_failed || client_failure.as_mut().poll(cx).is_ready();
        upstream_failed = upstream_failed || upstream_failure.as_mut().poll(cx).is_ready();
        let last = matches!(down, Way::Ended);
        up.poll(cx, client_failed, last).map_err(|end| match end {
            End::Sender(error) => Broken::Client(error),
            End::Receiver(error) => Broken::Upstream(error),
        })?;
        let last = matches!(up, Way::Ended);
        down.poll(cx, upstream_failed, last).map_err(|end| match end {
            End::Sender(error) => Broken::Upstream(error),
            End::Receiver(error) => Broken::Client(error),
        })?;
        match (&up, &down) {
            (Way::Ended, Way::Ended) => Poll::Ready(Ok(())),
            _ => Poll::Pending,
        }
    })
    .await
}

/// Resolves when no byte has moved for `timeout` (and at most a quarter of it longer).
async fn idle(traffic: &Traffic, timeout: Duration) {
    let mut seen = traffic.total();
    let mut quiet = 0;
    while quiet < 4 {
        sleep(timeout / 4).await;
        let now = traffic.total();
        quiet = if now == seen { quiet + 1 } else { 0 };
        seen = now;
    }
}

/// A direction until it has ended.
enum Way<'a> {
    Open(Direction<'a>),
    Ended,
}

impl Way<'_> {
    /// Moves what can be moved, and passes an end on. That of the `last` direction is passed on by
    /// closing the sockets, which the caller does at once.
    fn poll(&mut self, cx: &mut Context<'_>, sender_failed: bool, last: bool) -> Result<(), End> {
        match self {
            Self::Open(direction) => {
                if direction.poll(cx, sender_failed, last)?.is_ready() {
                    if !last {
                        direction.to.finish().map_err(End::Receiver)?;
                    }
                    *self = Self::Ended;
                }
                Ok(())
            }
            // It said its last byte, nothing is read from it, and now it has given up altogether.
            Self::Ended if sender_failed => Err(End::Sender(io::ErrorKind::ConnectionReset.into())),
            Self::Ended => Ok(()),
        }
    }
}

/// One way through a connection.
struct Direction<'a> {
    from: &'a Socket,
    to: &'a Socket,
    carrier: Carrier,
    busyness: Busyness,
    pipes: Option<&'a Arc<PipePool>>,
    moved: &'a AtomicU64,
    beside: Option<Beside<'a>>,
    /// The shortcut of the other direction, if there may be one: others than the relay use its sender then, those who
    /// open that, and its receiver, which writes through it.
    against: Option<&'a OnceLock<Arc<dyn Shortcut>>>,
}

/// What carries the bytes of a direction right now.
enum Carrier {
    Copy(Copy),
    Splice(Pipe),
}

/// Interactive traffic must not pay for pipes, bulk must not pay for copies; so a direction starts
/// by copying and earns its pipe.
enum Busyness {
    Quiet { large_pulls: u8 },
    Busy { small_pulls: u8 },
}

/// Which end of a direction failed.
enum End {
    Sender(io::Error),
    Receiver(io::Error),
}

impl<'a> Direction<'a> {
    fn new(
        from: &'a Socket,
        to: &'a Socket,
        pipes: Option<&'a Arc<PipePool>>,
        moved: &'a AtomicU64,
    ) -> Self {
        Self {
            from,
            to,
            carrier: Carrier::Copy(Copy::default()),
            busyness: Busyness::Quiet { large_pulls: 0 },
            pipes,
            moved,
            beside: None,
            against: None,
        }
    }

    /// Moves bytes until the sender ends (then it is ready), runs dry, the receiver is full, or the
    /// turn is over.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        sender_failed: bool,
        last: bool,
    ) -> Result<Poll<()>, End> {
        let mut left = TURN;
        loop {
            while self.carrier.held() > 0 {
                match self.to.poll_give(cx, |to| self.carrier.push(to)) {
                    Poll::Ready(pushed) => self.count(pushed.map_err(End::Receiver)?),
                    // Held back, it does not read, and reading is how it would learn of the reset.
                    Poll::Pending if sender_failed => {
                        return Err(End::Sender(io::ErrorKind::ConnectionReset.into()));
                    }
                    Poll::Pending => return Ok(Poll::Pending),
                }
            }
            if left == 0 {
                cx.waker().wake_by_ref();
                return Ok(Poll::Pending);
            }
            self.choose_carrier();
            if let Some(beside) = &mut self.beside
                && beside.poll_pause(cx).is_pending()
            {
                return Ok(Poll::Pending);
            }
            let (to, carrier, beside) = (self.to, &mut self.carrier, &self.beside);
            let mut early = false;
            let pulled = self.from.poll_take(cx, |from| {
                let settled = || beside.as_ref().is_none_or(|it| it.is_settled(to));
                if settled() {
                    let pulled = carrier.pull(from, to.fd())?;
                    // Asked again at the end, after which nothing can take the shortcut any more.
                    if pulled.taken > 0 || settled() {
                        return Ok(pulled);
                    }
                }
                early = true;
                Ok(Pulled { taken: 0, passed: 0, short: false })
            });
            if let Some(beside) = &mut self.beside {
                if early {
                    beside.pause().map_err(End::Receiver)?;
                    continue;
                }
                beside.go_on();
            }
            let Poll::Ready(pulled) = pulled else {
                // Nothing moves, so nothing is held on to.
                self.carrier = Carrier::Copy(Copy::default());
                return Ok(Poll::Pending);
            };
            let pulled = pulled.map_err(End::Sender)?;
            if pulled.taken == 0 {
                return self.end(last).map(Poll::Ready);
            }
            self.count(pulled.passed);
            if let Some(beside) = &mut self.beside {
                beside.took_a_piece(self.from, self.to, self.moved.load(Ordering::Relaxed));
            }
            self.busyness.after(pulled.taken);
            left = left.saturating_sub(pulled.taken.max(LEAST_COST));
        }
    }

    /// Takes what reads as an end for one, unless it is a reset. Of that the kernel tells once, and it may have
    /// told a client whose write met it in the sender's socket; which need not even have heard of it, if a part
    /// was written before.
    fn end(&self, last: bool) -> Result<(), End> {
        let Some(shortcut) = self.against else { return Ok(()) };
        // What becomes of the connection from now on, the relay itself is told.
        shortcut.get().inspect(|shortcut| shortcut.close());
        match self.from.has_ended(self.moved.load(Ordering::Relaxed), last) {
            true => Ok(()),
            false => Err(End::Sender(io::ErrorKind::ConnectionReset.into())),
        }
    }

    /// Only called with nothing held, so that changing carriers cannot reorder bytes.
    fn choose_carrier(&mut self) {
        match (&self.carrier, &self.busyness) {
            (Carrier::Copy(_), Busyness::Busy { .. }) => {
                if let Some(pipe) = self.pipes.and_then(|pool| pool.lend()) {
                    self.carrier = Carrier::Splice(pipe);
                }
            }
            (Carrier::Splice(_), Busyness::Quiet { .. }) => {
                self.carrier = Carrier::Copy(Copy::default());
            }
            _ => {}
        }
    }

    fn count(&self, bytes: usize) {
        // One writer: no need for a locked addition on the hot path.
        let moved = self.moved.load(Ordering::Relaxed) + bytes as u64;
        self.moved.store(moved, Ordering::Relaxed);
        if let Some(beside) = &self.beside {
            beside.forwarded(moved);
        }
    }
}

impl Carrier {
    fn held(&self) -> usize {
        match self {
            Self::Copy(copy) => copy.held(),
            Self::Splice(pipe) => pipe.held(),
        }
    }

    fn pull(&mut self, from: RawFd, to: RawFd) -> io::Result<Pulled> {
        match self {
            Self::Copy(copy) => copy.pull(from, to),
            Self::Splice(pipe) => pipe.pull(from, to),
        }
    }

    fn push(&mut self, to: RawFd) -> io::Result<usize> {
        match self {
            Self::Copy(copy) => copy.push(to),
            Self::Splice(pipe) => pipe.push(to),
        }
    }
}

impl Busyness {
    fn after(&mut self, taken: usize) {
        let small = taken < SMALL;
        *self = match *self {
            Self::Quiet { large_pulls } if !small && large_pulls + 1 == LARGE_PULLS => {
                Self::Busy { small_pulls: 0 }
            }
            Self::Quiet { large_pulls } if !small => Self::Quiet { large_pulls: large_pulls + 1 },
            Self::Busy { small_pulls } if small && small_pulls + 1 < SMALL_PULLS => {
                Self::Busy { small_pulls: small_pulls + 1 }
            }
            Self::Busy { .. } if !small => Self::Busy { small_pulls: 0 },
            Self::Quiet { .. } | Self::Busy { .. } => Self::Quiet { large_pulls: 0 },
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(pulls: impl IntoIterator<Item = usize>) -> Busyness {
        let mut busyness = Busyness::Quiet { large_pulls: 0 };
        pulls.into_iter().for_each(|taken| busyness.after(taken));
        busyness
    }

    #[test]
    fn bulk_earns_a_pipe_also_in_pieces_smaller_than_a_read() {
        assert!(matches!(after([48 * 1024; 3]), Busyness::Busy { .. }));
        assert!(matches!(after([64, 48 * 1024, 48 * 1024]), Busyness::Quiet { .. }));
    }

    #[test]
    fn small_traffic_never_earns_one_and_in_the_end_gives_one_up() {
        assert!(matches!(after([4096; 100]), Busyness::Quiet { .. }));
        let bulk = [48 * 1024; 3].into_iter();
        assert!(matches!(after(bulk.clone().chain([64; 15])), Busyness::Busy { .. }));
        assert!(matches!(after(bulk.chain([64; 16])), Busyness::Quiet { .. }));
    }
}

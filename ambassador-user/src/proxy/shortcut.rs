//! A way past user space for what a client sends, as the relay sees it: who offers it, and what the relay
//! owes a connection that has one.
//!
//! Bytes that do not take the shortcut arrive at the accepted socket and are relayed as ever. The order of
//! both kinds is kept by two rules: the shortcut takes no byte while the relay owes an earlier one, and
//! the relay forwards none before the upstream's socket has accepted what took the shortcut.

use std::fmt::Debug;
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::time::{Sleep, sleep};

use super::socket::Socket;

/// How often the relay asks whether bytes that took a shortcut have arrived. It seldom has to ask twice:
/// they arrive within the client's system call.
const PAUSE: Duration = Duration::from_millis(1);
/// How long it asks: that call may be preempted, or its group be throttled.
const PATIENCE: Duration = Duration::from_secs(10);

/// Offers shortcuts.
pub trait Shortcuts: Debug + Send + Sync {
    /// The client of an accepted socket, if it was made ready for one when it connected.
    fn candidate(&self, client: BorrowedFd<'_>) -> Option<Arc<dyn Candidate>>;
}

/// A client that was made ready for a shortcut. It is forgotten when this is dropped, or the next one that comes from
/// the same port would be taken for it.
pub trait Candidate: Debug + Send + Sync {
    /// To be shown the socket to its upstream before that is connected.
    fn prepare(&self, upstream: BorrowedFd<'_>);

    /// Whether the client, which has sent its first bytes, can still have one. If not, its socket is an ordinary
    /// one from now on.
    fn can_have(&self) -> bool;

    /// Opens a shortcut from its accepted socket to the upstream's, which has accepted so many of its bytes.
    fn open(
        &self,
        client: BorrowedFd<'_>,
        upstream: BorrowedFd<'_>,
        forwarded: u64,
    ) -> Option<Arc<dyn Shortcut>>;

    /// Makes the client's socket an ordinary one again: it gets none.
    fn decline(&self);
}

/// The shortcut of one connection. It ends when it is dropped.
pub trait Shortcut: Debug + Send + Sync {
    /// Bytes that took it so far.
    fn carried(&self) -> u64;

    /// Bytes that took it and that the upstream has not acknowledged: so many at the most.
    fn in_flight(&self) -> u64;

    /// Whether the upstream's socket has accepted all of them.
    fn is_settled(&self, upstream: BorrowedFd<'_>) -> bool;

    /// Says how many bytes the relay has forwarded in all, and the upstream's socket accepted.
    fn forwarded(&self, bytes: u64);

    /// Lets no further byte take it. Can be called at any time.
    fn close(&self);
}

/// A connection that may have a shortcut once it has proved to live: for one of a single request, opening it
/// would cost more than it brings.
pub struct Prospect<'a> {
    pub candidate: &'a dyn Candidate,
    /// Whether the route allows one, which can change at any time.
    pub allowed: &'a (dyn Fn() -> bool + Send + Sync),
}

/// What is, or may come to be, beside a direction of the relay.
pub(super) struct Beside<'a> {
    shortcut: &'a OnceLock<Arc<dyn Shortcut>>,
    prospect: Option<Prospect<'a>>,
    /// Whether the client has sent something that was relayed.
    begun: bool,
    /// Since when the relay has had to wait, and until when it pauses.
    waiting: Option<(Instant, Pin<Box<Sleep>>)>,
}

impl<'a> Beside<'a> {
    /// Nothing, if there is no shortcut and no prospect of one.
    pub(super) fn new(
        shortcut: &'a OnceLock<Arc<dyn Shortcut>>,
        prospect: Option<Prospect<'a>>,
    ) -> Option<Self> {
        let worth_it = prospect.is_some() || shortcut.get().is_some();
        worth_it.then_some(Self { shortcut, prospect, begun: false, waiting: None })
    }

    pub(super) fn is_settled(&self, receiver: &Socket) -> bool {
        self.shortcut.get().is_none_or(|shortcut| shortcut.is_settled(receiver.as_fd()))
    }

    /// Says how many bytes the relay has forwarded in all.
    pub(super) fn forwarded(&self, bytes: u64) {
        if let Some(shortcut) = self.shortcut.get() {
            shortcut.forwarded(bytes);
        }
    }

    /// The relay has taken a piece from the sender. With the second one, a shortcut is opened.
    pub(super) fn took_a_piece(&mut self, sender: &Socket, receiver: &Socket, forwarded: u64) {
        let Some(prospect) = &self.prospect else { return };
        if !mem::replace(&mut self.begun, true) {
            if !prospect.candidate.can_have() {
                self.prospect = None;
            }
            return;
        }
        if !(prospect.allowed)() {
            prospect.candidate.decline();
        } else if let Some(shortcut) =
            prospect.candidate.open(sender.as_fd(), receiver.as_fd(), forwarded)
        {
            let shortcut = self.shortcut.get_or_init(|| shortcut);
            // Whoever takes it back closes what is set by then; after that it is seen here.
            if !(prospect.allowed)() {
                shortcut.close();
            }
        }
        self.prospect = None;
    }

    /// Begins a pause. Bytes that do not arrive at all are lost, and then the connection must not end as
    /// if it were whole.
    pub(super) fn pause(&mut self) -> io::Result<()> {
        let since = self.waiting.as_ref().map_or_else(Instant::now, |(since, _)| *since);
        if since.elapsed() > PATIENCE {
            return Err(io::Error::other("bytes that took the shortcut have not arrived"));
        }
        self.waiting = Some((since, Box::pin(sleep(PAUSE))));
        Ok(())
    }

    /// Ready when there is no pause, or it is over.
    pub(super) fn poll_pause(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.waiting {
            Some((_, pause)) if !pause.is_elapsed() => pause.as_mut().poll(cx),
            _ => Poll::Ready(()),
        }
    }

    /// There is nothing to wait for any more.
    pub(super) fn go_on(&mut self) {
        self.waiting = None;
    }
}

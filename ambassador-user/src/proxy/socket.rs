//! One connected stream socket, TCP or Unix, registered with the runtime.
//!
//! Both families behave alike for a relay, so one type serves both, and the relays do their system
//! calls on its descriptor directly: no adapter between them and the kernel.

use std::io;
use std::io::ErrorKind::{Interrupted, WouldBlock};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// Kubernetes nodes and cloud load balancers forget idle flows after minutes, so ask well before that.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(60))
    .with_interval(Duration::from_secs(15))
    .with_retries(4);

/// TCP_CLOSE of include/net/tcp_states.h: the connection is over.
const CLOSED: u8 = 7;

/// What kind of stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Tcp,
    Unix,
}

/// A connected stream socket. Dropping it closes it in order; [`Socket::reset`] does not.
#[derive(Debug)]
pub struct Socket {
    io: AsyncFd<socket2::Socket>,
    /// Whether a read that got less than it asked for has emptied the socket: then the read that would
    /// only find EAGAIN is saved. Not so on Unix sockets, where a read ends at passed descriptors, and
    /// not on TCP once the peer has sent urgent data, where it ends at the urgent mark.
    short_read_empties: AtomicBool,
    /// Whether the next read does not wait to be told that there is something.
    promising: AtomicBool,
}

/// What a carrier did in one go.
#[derive(Debug)]
pub struct Pulled {
    /// Bytes taken from the sender; none at the end of its stream.
    pub taken: usize,
    /// Of these, bytes passed on to the receiver already.
    pub passed: usize,
    /// Less than asked for.
    pub short: bool,
}

impl Socket {
    /// Registers a non-blocking socket with the current runtime.
    pub fn new(socket: socket2::Socket, family: Family) -> io::Result<Self> {
        let interest = Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY;
        Ok(Self {
            io: register(socket, interest)?,
            short_read_empties: AtomicBool::new(family == Family::Tcp),
            promising: AtomicBool::new(false),
        })
    }

    /// The same for the socket of a client, which mostly has said something by the time it is read. Of that the
    /// runtime tells only after all others have had their turn, who may be many when a server has failed.
    pub fn accepted(socket: socket2::Socket, family: Family) -> io::Result<Self> {
        Ok(Self { promising: AtomicBool::new(true), ..Self::new(socket, family)? })
    }

    /// Does `take` as soon as there is something to read.
    pub fn poll_take(
        &self,
        cx: &mut Context<'_>,
        mut take: impl FnMut(RawFd) -> io::Result<Pulled>,
    ) -> Poll<io::Result<Pulled>> {
        if self.promising.load(Ordering::Relaxed) {
            self.promising.store(false, Ordering::Relaxed);
            match take(self.fd()) {
                // Nothing has been done, and nothing of the socket is told.
                Err(error) if matches!(error.kind(), WouldBlock | Interrupted) => {}
                taken => return Poll::Ready(taken),
            }
        }
        loop {
            let mut guard = ready!(self.io.poll_read_ready(cx))?;
            match guard.try_io(|socket| take(socket.as_raw_fd())) {
                Ok(Ok(pulled)) => {
                    if pulled.short && self.short_read_empties.load(Ordering::Relaxed) {
                        guard.clear_ready();
                    }
                    return Poll::Ready(Ok(pulled));
                }
                Ok(Err(error)) if error.kind() == Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }

    /// Does `give` as soon as there is room to write.
    pub fn poll_give(
        &self,
        cx: &mut Context<'_>,
        mut give: impl FnMut(RawFd) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.io.poll_write_ready(cx))?;
            match guard.try_io(|socket| give(socket.as_raw_fd())) {
                Ok(Err(error)) if error.kind() == Interrupted => {}
                Ok(done) => return Poll::Ready(done),
                Err(_would_block) => {}
            }
        }
    }

    /// Resolves when the peer has reset the connection, also while nobody reads or writes.
    ///
    /// To be polled before each read: urgent data that came with the bytes to be read is learned here.
    pub async fn failed(&self) {
        let exception = self.io.ready(Interest::ERROR | Interest::PRIORITY).await;
        if exception.is_ok_and(|exception| !exception.ready().is_error()) {
            self.short_read_empties.store(false, Ordering::Relaxed);
            // The error stays in the socket: this only says that it is there.
            let _ = self.io.ready(Interest::ERROR).await;
        }
    }

    /// Waits for a connect in progress and tells how it ended.
    pub async fn connected(&self) -> io::Result<()> {
        let _ = self.io.writable().await?;
        match self.io.get_ref().take_error()? {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// The descriptor, for an attempt that may fail with `WouldBlock`.
    pub fn fd(&self) -> RawFd {
        self.io.get_ref().as_raw_fd()
    }

    /// Whether the peer has ended its stream, of which so many bytes have been read, and not the connection, unless
    /// ours is ended `already`.
    pub fn has_ended(&self, read: u64, already: bool) -> bool {
        // The kernel counts sequence numbers, of which the FIN takes one (net/ipv4/tcp_input.c: `tcp_rcv_nxt_update`).
        // It counts nothing on a Unix socket, which has no such thing as a reset.
        tcp_info(self.as_fd()).map_or(true, |info| {
            info.tcpi_bytes_received > read && (already || info.tcpi_state != CLOSED)
        })
    }

    /// Sends a FIN: no more bytes come from here.
    pub fn finish(&self) -> io::Result<()> {
        match self.io.get_ref().shutdown(Shutdown::Write) {
            // The peer has already gone; the other direction will say how.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            other => other,
        }
    }

    /// Closes at once with a RST, so that the peer cannot take what it has for the whole.
    /// A Unix socket has no such thing: its peer sees the end, or ECONNRESET if it had sent more.
    pub fn reset(self) {
        // Cannot fail on a TCP socket, and means nothing on a Unix socket.
        let _ = self.io.get_ref().set_linger(Some(Duration::ZERO));
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.get_ref().as_fd()
    }
}

/// What the kernel tells of a TCP socket.
pub fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<libc::tcp_info> {
    // SAFETY: integers only, for which zeros are values.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the pointers lead to the value and to its length.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info)
}

/// Small writes go out at once, a vanished peer is noticed, and an urgent byte stays in the stream
/// (a relay that left it out of line would lose it).
///
/// Set on listeners too: accepted sockets inherit both, which saves the calls per connection.
pub fn tune_tcp<'s>(socket: impl Into<SockRef<'s>>) -> io::Result<()> {
    let socket = socket.into();
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)
}

/// Registers a non-blocking socket with the current runtime.
pub fn register(
    socket: socket2::Socket,
    interest: Interest,
) -> io::Result<AsyncFd<socket2::Socket>> {
    // SAFETY: a socket owns its descriptor and shows the same one for as long as it lives.
    unsafe { AsyncFd::register_with_interest(socket, interest) }.map_err(io::Error::from)
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // SAFETY: `receive` only ever writes to it, so what is initialised stays so.
        let room = unsafe { buffer.unfilled_mut() };
        let pulled = ready!(self.poll_take(cx, |socket| {
            receive(socket, room).map(|taken| Pulled { taken, passed: 0, short: false })
        }))?;
        // SAFETY: recv(2) has written the first `taken` bytes.
        unsafe { buffer.assume_init(pulled.taken) };
        buffer.advance(pulled.taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_give(cx, |socket| send(socket, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish())
    }
}

/// recv(2) into `buffer`.
pub(super) fn receive(fd: RawFd, buffer: &mut [MaybeUninit<u8>]) -> io::Result<usize> {
    // SAFETY: the pointer and the length describe `buffer`, which the kernel only writes to.
    let got = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    usize::try_from(got).map_err(|_negative| io::Error::last_os_error())
}

/// send(2) of what `fd` takes from `bytes`; a closed peer is an error, never a SIGPIPE.
pub(super) fn send(fd: RawFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length describe `bytes`, which the kernel only reads.
    let sent = unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_negative| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::task::Waker;

    use super::*;

    /// What the first look at a client finds that has done so.
    fn found_at_once(did: impl FnOnce(TcpStream)) -> Poll<io::Result<usize>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // Its events are learned by no one here.
        let _entered = runtime.enter();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        did(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let (socket, _) = listener.accept().unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = Socket::accepted(socket.into(), Family::Tcp).unwrap();
        let mut room = [MaybeUninit::uninit(); 16];
        let take =
            |fd| receive(fd, &mut room).map(|taken| Pulled { taken, passed: 0, short: true });
        let found = socket.poll_take(&mut Context::from_waker(Waker::noop()), take);
        found.map_ok(|pulled| pulled.taken)
    }

    #[test]
    fn what_a_client_said_is_taken_before_the_runtime_tells_of_it() {
        let says = |mut client: TcpStream| {
            client.write_all(b"hello").unwrap();
            std::mem::forget(client);
        };
        assert!(matches!(found_at_once(says), Poll::Ready(Ok(5))));
        assert!(matches!(found_at_once(std::mem::forget), Poll::Pending));
    }

    #[test]
    fn a_reset_is_met_and_not_only_looked_at() {
        let resets =
            |client| socket2::Socket::from(client).set_linger(Some(Duration::ZERO)).unwrap();
        let Poll::Ready(Err(error)) = found_at_once(resets) else { panic!("no error") };
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}

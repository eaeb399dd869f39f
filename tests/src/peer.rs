//! One end of a stream, in the hands of a test: it says, hears, finishes, resets, and never waits
//! for ever.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use libc::c_int;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::Socket;
use tempfile::TempDir;

use crate::address::{Address, Family};
use crate::noise::Noise;
use crate::wait::{SOON, until};

const CHUNK: usize = 64 * 1024;

/// A connected stream socket. One that is non-blocking waits by poll(2), as long as its timeouts say.
#[derive(Debug)]
pub struct Peer {
    socket: Socket,
}

/// A socket that accepts peers.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: Address,
    _directory: Option<TempDir>,
}

impl Peer {
    /// With a socket that was connected in a way of the test's own.
    pub fn of(socket: Socket) -> Result<Self> {
        socket.set_read_timeout(Some(SOON)).context("bound the time of reading")?;
        socket.set_write_timeout(Some(SOON)).context("bound the time of writing")?;
        if socket.domain().context("ask for a socket's domain")? != socket2::Domain::UNIX {
            socket.set_tcp_nodelay(true).context("set TCP_NODELAY")?;
        }
        Ok(Self { socket })
    }

    /// The socket itself, for what only one test needs.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Sends all of `bytes`.
    pub fn say(&self, bytes: &[u8]) -> Result<()> {
        let mut this = self;
        this.write_all(bytes).with_context(|| format!("send {} bytes", bytes.len()))
    }

    /// Receives exactly `length` bytes.
    pub fn hear(&self, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let mut this = self;
        this.read_exact(&mut bytes).with_context(|| format!("receive {length} bytes"))?;
        Ok(bytes)
    }

    /// Receives until the other end finishes; a reset is an error.
    pub fn hear_to_end(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut this = self;
        this.read_to_end(&mut bytes)
            .with_context(|| format!("receive to the end, {} bytes so far", bytes.len()))?;
        Ok(bytes)
    }

    /// Sends `question` and expects `answer`.
    pub fn ask(&self, question: &[u8], answer: &[u8]) -> Result<()> {
        self.say(question)?;
        let heard = self.hear(answer.len())?;
        ensure!(
            heard == answer,
            "asked {:?}, expected {:?}, heard {:?}",
            String::from_utf8_lossy(question),
            String::from_utf8_lossy(answer),
            String::from_utf8_lossy(&heard)
        );
        Ok(())
    }

    /// Sends the next `length` bytes of `noise`.
    pub fn say_noise(&self, noise: &mut Noise, length: usize) -> Result<()> {
        let mut chunk = vec![0; CHUNK];
        let mut left = length;
        while left > 0 {
            let piece = &mut chunk[..left.min(CHUNK)];
            noise.fill(piece);
            self.say(piece).with_context(|| format!("{left} of {length} bytes left"))?;
            left -= piece.len();
        }
        Ok(())
    }

    /// Expects the next `length` bytes of `noise`.
    pub fn hear_noise(&self, noise: &mut Noise, length: usize) -> Result<()> {
        let (mut heard, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
        let mut left = length;
        while left > 0 {
            let most = left.min(CHUNK);
            let mut this = self;
            let read = this
                .read(&mut heard[..most])
                .with_context(|| format!("receive, {left} of {length} bytes left"))?;
            ensure!(read > 0, "the end came {left} bytes early, of {length}");
            noise.fill(&mut expected[..read]);
            ensure!(
                heard[..read] == expected[..read],
                "lost, repeated or reordered bytes after {} of {length}",
                length - left
            );
            left -= read;
        }
        Ok(())
    }

    /// Expects the other end to finish without another byte.
    pub fn hear_end(&self) -> Result<()> {
        let rest = self.hear_to_end()?;
        ensure!(rest.is_empty(), "{} bytes where the end should be", rest.len());
        Ok(())
    }

    /// Expects to be reset, without reading a byte or an end before.
    pub fn hear_reset(&self) -> Result<()> {
        let mut this = self;
        match this.read(&mut [0; 64]) {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
            Err(error) => Err(error).context("wait for a reset"),
            Ok(0) => bail!("an end where a reset should be"),
            Ok(read) => bail!("{read} bytes where a reset should be"),
        }
    }

    /// Expects to be told, while only listening, that the connection has failed.
    pub fn notice_failure(&self) -> Result<io::Error> {
        until("the connection's failure", SOON, || {
            // Asked first: what fails is told of it before it is over.
            let is_over = self.socket.peer_addr().is_err();
            let error = self.socket.take_error().context("ask for a socket's error")?;
            ensure!(error.is_some() || !is_over, "the connection is over, and not by a failure");
            Ok(error)
        })
    }

    /// Expects the other end to be gone, in whatever way: an end or a reset.
    pub fn hear_close(&self) -> Result<()> {
        let mut rest = Vec::new();
        let mut this = self;
        match this.read_to_end(&mut rest) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => {
                return Err(error).context("wait for the other end to close");
            }
            _ => {}
        }
        ensure!(rest.is_empty(), "{} bytes where the close should be", rest.len());
        Ok(())
    }

    /// Sends an end of stream, and goes on listening.
    pub fn finish(&self) -> Result<()> {
        self.socket.shutdown(Shutdown::Write).context("finish sending")
    }

    /// Resets the connection.
    pub fn reset(self) -> Result<()> {
        self.socket.set_linger(Some(Duration::ZERO)).context("turn the close into a reset")
    }

    /// Sends the bytes of `noise` until the other end takes no more; returns how many it took.
    pub fn say_until_held_back(&self, noise: &mut Noise) -> Result<usize> {
        /// So long nobody takes a byte from a full pipeline, however slow the machine.
        const HELD_BACK: Duration = Duration::from_millis(700);
        self.socket.set_write_timeout(Some(HELD_BACK)).context("bound the time of writing")?;
        let mut chunk = vec![0; CHUNK];
        let mut taken = 0;
        loop {
            let before = noise.clone();
            noise.fill(&mut chunk);
            let mut said = 0;
            while said < CHUNK {
                let mut this = self;
                match this.write(&chunk[said..]) {
                    Ok(written) => said += written,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        // The noise must go on where the peer stopped listening.
                        *noise = before;
                        noise.fill(&mut chunk[..said]);
                        let restored = Some(SOON);
                        self.socket
                            .set_write_timeout(restored)
                            .context("bound the time of writing")?;
                        return Ok(taken + said);
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error).context("send until held back"),
                }
            }
            taken += said;
        }
    }
}

/// Turns on an option of a socket for which socket2 has no name.
pub fn turn_on(socket: &Socket, level: c_int, name: c_int) -> Result<()> {
    let on: c_int = 1;
    // SAFETY: the kernel reads an int, which is what it is given, with its size.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const on).cast(),
            size_of::<c_int>() as libc::socklen_t,
        )
    };
    ensure!(set == 0, "turn on option {name}: {}", io::Error::last_os_error());
    Ok(())
}

/// What a blocking socket does by itself: `act` again whenever the socket is ready, until it is late.
fn patiently<T>(
    socket: &Socket,
    ready: PollFlags,
    timeout: fn(&Socket) -> io::Result<Option<Duration>>,
    mut act: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let mut deadline = None;
    loop {
        match act() {
            Err(error) if error.kind() == ErrorKind::WouldBlock && socket.nonblocking()? => {
                let now = Instant::now();
                let deadline = *deadline.get_or_insert(now + timeout(socket)?.unwrap_or(SOON));
                let left = deadline.saturating_duration_since(now);
                let left = Timespec::try_from(left).map_err(io::Error::other)?;
                if poll(&mut [PollFd::new(socket, ready)], Some(&left))? == 0 {
                    return Err(error);
                }
            }
            done => return done,
        }
    }
}

impl Read for &Peer {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut socket = &self.socket;
        patiently(&self.socket, PollFlags::IN, Socket::read_timeout, || socket.read(buffer))
    }
}

impl Write for &Peer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut socket = &self.socket;
        patiently(&self.socket, PollFlags::OUT, Socket::write_timeout, || socket.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Listener {
    /// On an address of this family that nobody else uses, on this machine's loopback.
    pub fn new(family: Family) -> Result<Self> {
        match family {
            Family::Tcp => Address::from(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).listen(),
            Family::Tcp6 => Address::from(SocketAddr::from((Ipv6Addr::LOCALHOST, 0))).listen(),
            Family::Unix => {
                let directory = tempfile::tempdir().context("create a listener's directory")?;
                let address = Address::Unix(directory.path().join("server.sock"));
                Ok(Self { _directory: Some(directory), ..address.listen()? })
            }
        }
    }

    pub(crate) fn of(socket: Socket, address: Address) -> Result<Self> {
        // A limit on reading limits accept(2) too.
        socket.set_read_timeout(Some(SOON)).context("bound the time of accepting")?;
        Ok(Self { socket, address, _directory: None })
    }

    /// The socket itself.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Where to connect to.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Accepts the next peer.
    pub fn accept(&self) -> Result<Peer> {
        let (socket, _) = self
            .socket
            .accept()
            .with_context(|| format!("accept a connection on {}", self.address))?;
        Peer::of(socket)
    }
}

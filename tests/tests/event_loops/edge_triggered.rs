//! A loop as Go's and tokio's: every socket is registered once, edge-triggered, for both directions, and
//! used until it says that it would block.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use socket2::{Domain, SockAddr, Socket, Type};

use ambassador_tests::address::Address;
use ambassador_tests::noise::Noise;

const PATIENCE: Duration = Duration::from_secs(60);

/// One connection to an echo.
struct Conversation {
    socket: Socket,
    to_say: Noise,
    unsaid: usize,
    /// What was made of the noise, and not taken by the socket.
    pending: Vec<u8>,
    to_hear: Noise,
    unheard: usize,
    over: bool,
}

/// Sends noise on many connections at once, `length` bytes on each, and expects it back.
pub(crate) fn talk(echo: &Address, connections: usize, length: usize) -> Result<()> {
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC).context("make an epoll")?;
    let mut all = Vec::new();
    for number in 0..connections {
        let conversation = Conversation::begin(echo, number as u64, length)?;
        let both = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP;
        let data = epoll::EventData::new_u64(number as u64);
        epoll::add(&poll, &conversation.socket, data, both | epoll::EventFlags::ET)
            .context("register a socket")?;
        all.push(conversation);
    }
    let deadline = Instant::now() + PATIENCE;
    let mut events = Vec::with_capacity(connections);
    while !all.iter().all(|conversation| conversation.over) {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).context("bound the wait")?;
        epoll::wait(&poll, spare_capacity(&mut events), Some(&left)).context("wait for events")?;
        if events.is_empty() {
            let waiting = all.iter().filter(|conversation| !conversation.over).count();
            bail!("{waiting} of {connections} connections wait for an event that does not come");
        }
        for event in events.drain(..) {
            let number = event.data.u64();
            let go_on = all[number as usize].go_on();
            go_on.with_context(|| format!("connection {number}"))?;
        }
    }
    Ok(())
}

impl Conversation {
    fn begin(echo: &Address, seed: u64, length: usize) -> Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).context("open a socket")?;
        socket.set_nonblocking(true).context("make a socket non-blocking")?;
        match socket.connect(&SockAddr::from(echo.tcp()?)) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            done => done.with_context(|| format!("connect to {echo}"))?,
        }
        Ok(Self {
            socket,
            to_say: Noise::new(seed),
            unsaid: length,
            pending: Vec::new(),
            to_hear: Noise::new(seed),
            unheard: length,
            over: false,
        })
    }

    /// Says and hears until both would block: there is no other event before that.
    fn go_on(&mut self) -> Result<()> {
        if let Some(error) = self.socket.take_error().context("ask for a socket's error")? {
            return Err(error).context("connect");
        }
        self.say()?;
        self.hear()
    }

    fn say(&mut self) -> Result<()> {
        /// Not a power of two, so that it meets every boundary.
        const PIECE: usize = 48_611;
        while self.unsaid > 0 {
            if self.pending.is_empty() {
                self.pending = self.to_say.bytes(PIECE.min(self.unsaid));
            }
            match (&self.socket).write(&self.pending) {
                Ok(written) => {
                    self.pending.drain(..written);
                    self.unsaid -= written;
                    if self.unsaid == 0 {
                        self.socket.shutdown(Shutdown::Write).context("finish sending")?;
                    }
                }
                // One that is still connecting would block, too.
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("send"),
            }
        }
        Ok(())
    }

    fn hear(&mut self) -> Result<()> {
        let mut heard = [0; 64 * 1024];
        while !self.over {
            match (&self.socket).read(&mut heard) {
                Ok(0) => {
                    ensure!(self.unheard == 0, "the end came {} bytes early", self.unheard);
                    self.over = true;
                }
                Ok(read) => {
                    let heard = &heard[..read];
                    ensure!(read <= self.unheard, "{read} bytes where {} are left", self.unheard);
                    ensure!(
                        heard == self.to_hear.bytes(read),
                        "{} bytes early: not as sent",
                        self.unheard
                    );
                    self.unheard -= read;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("receive"),
            }
        }
        Ok(())
    }
}

//! Messages there and back, one at a time on each of many connections: what a proxy adds to a request.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::{STALL, Served, Target};
use crate::bench::latency::Latency;
use crate::bench::pattern;
use crate::bench::upstream::ECHO;

/// What a small request is made of.
const MESSAGE: usize = 64;
/// Round trips that are not timed: the first ones find cold caches.
const WARM_UP: usize = 100;
/// So many replies are taken at a time.
const EVENTS: usize = 64;

/// Does round trips of `size` bytes for `time`, checking each reply. One thread serves all the
/// connections, as an app with an event loop does.
pub fn run<T: Target>(
    target: &T,
    connections: usize,
    size: usize,
    time: Duration,
) -> Result<Served<T::Reading>> {
    let mut poll = Poll::new().context("create an epoll set")?;
    let mut conversations = Vec::with_capacity(connections);
    for number in 0..connections {
        let mut stream =
            super::connect(target.address(number * target.addresses().len() / connections))?;
        round_trip(&mut stream, number as u64)?;
        poll.registry()
            .register(&mut SourceFd(&stream.as_raw_fd()), Token(number), Interest::READABLE)
            .context("watch a connection")?;
        conversations.push(Conversation::new(stream, number as u64, size));
    }
    for conversation in &mut conversations {
        conversation.ask()?;
    }

    let mut cold = WARM_UP.max(2 * connections);
    let mut clock = None;
    let mut took = Vec::with_capacity(1 << 18);
    let mut unanswered = connections;
    let mut now = Instant::now();
    let mut events = Events::with_capacity(EVENTS);
    while unanswered > 0 {
        match poll.poll(&mut events, Some(STALL)) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            waited => waited.context("wait for replies")?,
        }
        ensure!(
            !events.is_empty(),
            "no reply on {unanswered} of {connections} connections in {STALL:?}"
        );
        for event in &events {
            let conversation = &mut conversations[event.token().0];
            if !conversation.hear()? {
                continue;
            }
            now = Instant::now();
            match &clock {
                Some(_) => took.push(now - conversation.asked),
                None if cold > 1 => cold -= 1,
                None => clock = Some((now, target.read()?)),
            }
            // Every request that was made is answered before the end, or the load fails.
            if clock.as_ref().is_some_and(|(start, _)| now - *start >= time) {
                unanswered -= 1;
            } else {
                conversation.ask()?;
            }
        }
    }
    let (start, before) = clock.context("time the round trips")?;
    let spent = (before, target.read()?);
    let count = took.len() as u64;
    let per_second = count as f64 / (now - start).as_secs_f64();
    Ok(Served { count, per_second, latency: Latency::of(took), spent })
}

/// One connection, whose messages one after the other are a stretch of the pattern.
struct Conversation {
    stream: TcpStream,
    /// Where in the pattern the message under way begins.
    position: u64,
    /// How much of its echo has come.
    heard: usize,
    asked: Instant,
    buffer: Vec<u8>,
}

impl Conversation {
    /// Each begins at another place, so that a reply on the wrong connection is wrong.
    fn new(stream: TcpStream, number: u64, size: usize) -> Self {
        let position = number * 7919;
        Self { stream, position, heard: 0, asked: Instant::now(), buffer: vec![0; size] }
    }

    fn ask(&mut self) -> Result<()> {
        self.asked = Instant::now();
        let message = pattern::at(self.position, self.buffer.len());
        self.stream.write_all(message).context("send a request")
    }

    /// Reads what has come, all of it or up to the end of the reply: only what comes later is told of again.
    /// Whether the reply is complete.
    fn hear(&mut self) -> Result<bool> {
        let got = self.stream.read(&mut self.buffer[self.heard..]).context("receive a reply")?;
        ensure!(got > 0, "the connection was closed before a reply");
        self.heard += got;
        if self.heard < self.buffer.len() {
            return Ok(false);
        }
        let wrong = pattern::first_wrong(self.position, &self.buffer);
        ensure!(wrong.is_none(), "a reply has wrong bytes");
        self.position += self.buffer.len() as u64;
        self.heard = 0;
        Ok(true)
    }
}

/// One small message there and back; `number` makes it unlike the one before.
pub fn round_trip(stream: &mut TcpStream, number: u64) -> Result<()> {
    let mut sent = [ECHO; MESSAGE];
    sent[MESSAGE - 8..].copy_from_slice(&number.to_le_bytes());
    stream.write_all(&sent).context("send a request")?;
    let mut received = [0; MESSAGE];
    stream.read_exact(&mut received).context("receive a reply")?;
    ensure!(sent == received, "a reply has wrong bytes");
    Ok(())
}

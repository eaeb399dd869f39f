//! One conversation: what both ends say, hear and do, all of it from a seed, and every byte checked.
//!
//! Both ends may be in one process, or the seed is all that one tells the other.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::thread::{scope, sleep};
use std::time::Duration;

use crate::noise::Noise;
use crate::peer::Peer;
use crate::readiness::Readiness;
use crate::wait::SOON;
use crate::way::{Way, Wire};
use anyhow::{Context, Result, ensure};
use rustix::event::epoll::EventFlags;

/// Up to 4 MiB are said, and up to 16 MiB where even the buffers of two connections shall be full.
const LARGE_BITS: u64 = 22;
const MANY_BITS: u64 = 24;
const LARGEST_PIECE: usize = 256 << 10;
/// The buffers of a socket that holds little, but more than one packet of a loopback's.
const NARROW: usize = 128 << 10;

/// What is said of the one thing that must never happen, whoever fails.
pub const LOST: &str = "lost, repeated or reordered bytes";

/// Who speaks when, and how it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// Both at the same time.
    BothSpeak,
    /// The server waits until it has heard all.
    ClientFirst,
    /// The client waits until it has heard all.
    ServerFirst,
    /// The client, in the midst of it.
    ClientResets,
    /// The server, in the midst of it.
    ServerResets,
}

/// What both ends of a connection are going to do.
#[derive(Debug)]
pub struct Plan {
    /// Who speaks when.
    pub course: Course,
    /// So much the client says before the server accepts it.
    early: usize,
    /// What the client does.
    pub client: End,
    /// What the server does.
    pub server: End,
}

impl Plan {
    /// A plan by the next numbers of some noise.
    pub fn of(noise: &mut Noise) -> Self {
        use Course::*;
        let course = [BothSpeak, BothSpeak, ClientFirst, ServerFirst, ClientResets, ServerResets];
        let course = course[noise.below(6) as usize];
        let (up, down) = (Words::of(noise), Words::of(noise));
        let end = |says: &Words, hears: &Words, first, resets, noise: &mut Noise| {
            let other_resets = matches!(course, ClientResets | ServerResets);
            let close = match course {
                _ if course == resets => Close::Resets,
                _ if other_resets => Close::IsReset,
                _ => Close::Finishes,
            };
            let (mut says, mut hears) = (says.clone(), hears.clone());
            if close == Close::Resets {
                says.left = noise.below(says.left as u64) as usize;
                hears.left = noise.below(hears.left as u64) as usize;
            }
            End {
                says,
                hears,
                close,
                listens_first: matches!(course, ClientFirst | ServerFirst) && course != first,
                by_events: noise.below(2) == 0,
                saying: Pace::of(noise),
                hearing: Pace::of(noise),
                late: Duration::from_millis([0, 0, 100, 500][noise.below(4) as usize]),
                narrow: noise.below(3) == 0,
            }
        };
        let client = end(&up, &down, ClientFirst, ClientResets, noise);
        let server = end(&down, &up, ServerFirst, ServerResets, noise);
        // A client that is gone before it was accepted need not reach a server.
        let may_be_early = !client.listens_first && client.close != Close::Resets;
        let early = if may_be_early && noise.below(3) == 0 { 1 + noise.below(1000) } else { 0 };
        Self { course, early: client.says.left.min(early as usize), client, server }
    }

    /// A conversation that goes on until somebody else cuts it, with resets.
    pub fn until_cut(noise: &mut Noise) -> Self {
        let mut plan = Self::of(noise);
        plan.course = Course::BothSpeak;
        for end in [&mut plan.client, &mut plan.server] {
            end.says.left = usize::MAX;
            end.hears.left = usize::MAX;
            end.close = Close::IsReset;
            end.listens_first = false;
        }
        plan
    }

    /// Connects, and accepts.
    pub fn open(&mut self, wire: &Wire) -> Result<(Peer, Peer)> {
        let client = match wire.road.way {
            // Clients of both kinds, one of which is enrolled.
            Way::Auto | Way::Vouched if !self.client.by_events => wire.road.address.connect()?,
            _ => wire.road.connect()?,
        };
        client.say(&self.client.says.next(self.early))?;
        Ok((client, wire.listener.accept()?))
    }
}

/// How an end's part comes to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Close {
    Finishes,
    Resets,
    IsReset,
}

/// What one end of a connection is going to do.
#[derive(Debug)]
pub struct End {
    says: Words,
    hears: Words,
    close: Close,
    /// Says nothing before it has heard all.
    listens_first: bool,
    /// Edge-triggered in one thread; otherwise blocking in two.
    by_events: bool,
    saying: Pace,
    hearing: Pace,
    /// Lets the other wait for so long before it hears the first byte.
    late: Duration,
    narrow: bool,
}

impl End {
    /// How many bytes it is going to say and to hear.
    pub fn bytes(&self) -> usize {
        self.says.left + self.hears.left
    }

    /// Does that, to its end; an error if the other end does anything else, with [`LOST`] in it if that is what
    /// it said.
    pub fn take_part(mut self, peer: Peer) -> Result<()> {
        let close = self.close;
        if self.narrow {
            peer.socket().set_recv_buffer_size(NARROW).context("narrow what can be heard")?;
            peer.socket().set_send_buffer_size(NARROW).context("narrow what can be said")?;
        }
        let mut done = match self.by_events {
            true => vec![self.take_part_by_events(&peer)],
            false => self.take_part_by_threads(&peer),
        };
        if close == Close::IsReset {
            // A redirected write meets the reset in the upstream's socket, which may have told the relay of it by
            // then, and is told that there is nothing any more. The client's own socket is reset in a moment.
            if let [Err(error)] = &done[..]
                && error.kind() == ErrorKind::BrokenPipe
            {
                done.push(Err(peer.notice_failure()?));
            }
            // One of the two is told of the reset, the other that there is nothing any more.
            let mut kinds = done.iter().filter_map(|it| it.as_ref().err().map(io::Error::kind));
            let broken =
                [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe, ErrorKind::UnexpectedEof];
            ensure!(kinds.clone().any(|kind| kind == broken[0]), "not reset: {done:?}");
            ensure!(kinds.all(|kind| broken.contains(&kind)), "not only reset: {done:?}");
            return Ok(());
        }
        done.into_iter().collect::<io::Result<()>>()?;
        if close == Close::Resets { peer.reset() } else { Ok(()) }
    }

    fn take_part_by_threads(&mut self, peer: &Peer) -> Vec<io::Result<()>> {
        let finishes = self.close == Close::Finishes;
        let mut hear = || {
            sleep(self.late);
            hear(peer, &mut self.hears, &mut self.hearing, finishes)
        };
        let mut say = || say(peer, &mut self.says, &mut self.saying, finishes);
        if self.listens_first {
            return vec![hear(), say()];
        }
        scope(|scope| {
            let hearing = scope.spawn(hear);
            vec![say(), hearing.join().expect("a listener does not panic")]
        })
    }

    fn take_part_by_events(&mut self, peer: &Peer) -> io::Result<()> {
        let socket = peer.socket();
        let finishes = self.close == Close::Finishes;
        socket.set_nonblocking(true)?;
        let wanted = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        let readiness = Readiness::of(socket, wanted).map_err(io::Error::other)?;
        let (mut said_all, mut heard_all) = (false, false);
        let (mut words, mut heard) = (Vec::new(), vec![0; LARGEST_PIECE]);
        loop {
            while !heard_all {
                if self.hears.left == 0 && !finishes {
                    heard_all = true;
                    break;
                }
                let most = self.hearing.piece().min(self.hears.left.max(1));
                match { socket }.read(&mut heard[..most]) {
                    Ok(0) => heard_all = self.hears.end()?,
                    Ok(read) => self.hears.expect(&heard[..read])?,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            while !said_all && (heard_all || !self.listens_first) {
                if words.is_empty() {
                    words = self.says.next(self.saying.piece());
                }
                if words.is_empty() {
                    said_all = true;
                    if finishes {
                        socket.shutdown(Shutdown::Write)?;
                    }
                    break;
                }
                match socket.send(&words) {
                    Ok(sent) => drop(words.drain(..sent)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                }
            }
            if said_all && heard_all {
                return Ok(());
            }
            sleep(std::mem::take(&mut self.late));
            if readiness.within(SOON).map_err(io::Error::other)?.is_none() {
                return Err(ErrorKind::TimedOut.into());
            }
        }
    }
}

fn say(mut peer: &Peer, words: &mut Words, pace: &mut Pace, finishes: bool) -> io::Result<()> {
    while words.left > 0 {
        peer.write_all(&words.next(pace.piece()))?;
    }
    if finishes { peer.socket().shutdown(Shutdown::Write) } else { Ok(()) }
}

fn hear(mut peer: &Peer, words: &mut Words, pace: &mut Pace, to_end: bool) -> io::Result<()> {
    let mut heard = vec![0; LARGEST_PIECE];
    while words.left > 0 || to_end {
        let most = pace.piece().min(words.left.max(1));
        match peer.read(&mut heard[..most])? {
            0 => return words.end().map(drop),
            read => words.expect(&heard[..read])?,
        }
    }
    Ok(())
}

/// What is left to be said, or heard, in one direction.
#[derive(Debug, Clone)]
struct Words {
    noise: Noise,
    left: usize,
}

impl Words {
    /// Small ones as often as large ones; and now and then what does not fit into the buffers on its way.
    fn of(noise: &mut Noise) -> Self {
        let bits = if noise.below(16) == 0 { MANY_BITS } else { noise.below(LARGE_BITS + 1) };
        let left = 1 + noise.below(1 << bits) as usize;
        Self { noise: Noise::new(noise.below(u64::MAX)), left }
    }

    fn next(&mut self, most: usize) -> Vec<u8> {
        let length = self.left.min(most);
        self.left -= length;
        self.noise.bytes(length)
    }

    fn expect(&mut self, heard: &[u8]) -> io::Result<()> {
        let left = self.left;
        if self.next(heard.len()) != heard {
            let fault = format!("{LOST}, {left} before the end");
            return Err(io::Error::other(fault));
        }
        Ok(())
    }

    /// That it is at its end.
    fn end(&self) -> io::Result<bool> {
        let early =
            || io::Error::new(ErrorKind::UnexpectedEof, format!("{} bytes early", self.left));
        if self.left == 0 { Ok(true) } else { Err(early()) }
    }
}

/// In what pieces, and with which pauses.
#[derive(Debug)]
struct Pace {
    rhythm: Noise,
    largest: usize,
    /// One piece in so many is waited for.
    pauses: u64,
}

impl Pace {
    fn of(noise: &mut Noise) -> Self {
        let (largest, pauses) =
            [(LARGEST_PIECE, u64::MAX), (LARGEST_PIECE, 8), (16 << 10, 8), (1 << 10, 100)]
                [noise.below(4) as usize];
        Self { rhythm: Noise::new(noise.below(u64::MAX)), largest, pauses }
    }

    /// The length of the next piece, when it is time for it.
    fn piece(&mut self) -> usize {
        if self.rhythm.below(self.pauses) == 0 {
            sleep(Duration::from_micros(self.rhythm.below(5_000)));
        }
        1 + self.rhythm.below(self.largest as u64) as usize
    }
}

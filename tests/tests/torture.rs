//! Torture: hundreds of connections at once that do everything an app may do, in an order nobody
//! foresaw, and whose every byte is checked. It takes nothing but this binary, the ambassador's
//! (`AMBASSADOR_BIN`) and a loopback.
//!
//! By default it is a slice of some seconds a way; `AMBASSADOR_TORTURE=full` is all of it. What each
//! connection does follows from a seed, which is printed; `AMBASSADOR_TORTURE_SEED` repeats it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::{Mutex, PoisonError};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant, SystemTime};

use ambassador_tests::kernel::Kernel;
use ambassador_tests::noise::Noise;
use ambassador_tests::on_every_way;
use ambassador_tests::peer::Peer;
use ambassador_tests::readiness::Readiness;
use ambassador_tests::wait::SOON;
use ambassador_tests::way::Wire;
use anyhow::{Context, Result, ensure};
use rustix::event::epoll::EventFlags;

on_every_way! { tcp: Tcp; every_byte_survives }

/// Up to 4 MiB are said, and up to 16 MiB where even the buffers of two connections shall be full.
const LARGE_BITS: u64 = 22;
const MANY_BITS: u64 = 24;
const LARGEST_PIECE: usize = 256 << 10;
/// The buffers of a socket that holds little, but more than one packet of a loopback's.
const NARROW: usize = 128 << 10;
/// No round takes so long, on a slow machine either.
const ROUND: Duration = Duration::from_secs(180);

fn every_byte_survives(wire: &Wire) -> Result<()> {
    // One way at a time: sockets are limited, and the kernel's memory is everybody's.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let full = std::env::var_os("AMBASSADOR_TORTURE").is_some_and(|extent| extent == "full");
    let (rounds, at_once) = if full { (25, 200) } else { (2, 60) };
    let seed = match std::env::var("AMBASSADOR_TORTURE_SEED") {
        Ok(seed) => seed.parse().context("parse AMBASSADOR_TORTURE_SEED")?,
        Err(_) => SystemTime::UNIX_EPOCH.elapsed().context("ask for a seed")?.as_secs(),
    };
    println!("AMBASSADOR_TORTURE_SEED={seed}");
    let kernel = Kernel::watch()?;
    let mut seeds = Noise::new(seed);
    for round in 0..rounds {
        let began = Instant::now();
        scope(|scope| {
            let mut conversations = Vec::new();
            for number in 0..at_once {
                let mut plan = Plan::of(&mut Noise::new(seeds.below(u64::MAX)));
                let told = format!("round {round}, connection {number}, {:?}", plan.course);
                let (client, server) = plan.open(wire).with_context(|| told.clone())?;
                let client = scope.spawn(move || plan.client.take_part(client));
                let server = scope.spawn(move || plan.server.take_part(server));
                conversations.push((told, client, server));
            }
            for (told, client, server) in conversations {
                let client = client.join().expect("a client does not panic");
                let server = server.join().expect("a server does not panic");
                // The failure of one is often that of the other.
                ensure!(
                    client.is_ok() && server.is_ok(),
                    "{told}: the client: {client:#?}; the server: {server:#?}"
                );
            }
            Ok(())
        })
        .with_context(|| format!("AMBASSADOR_TORTURE_SEED={seed}"))?;
        ensure!(began.elapsed() < ROUND, "round {round} took {:?}", began.elapsed());
    }
    kernel.is_unharmed()
}

/// Who speaks when, and how it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Course {
    BothSpeak,
    ClientFirst,
    ServerFirst,
    ClientResets,
    ServerResets,
}

/// What both ends of a connection are going to do.
struct Plan {
    course: Course,
    /// So much the client says before the server accepts it.
    early: usize,
    client: End,
    server: End,
}

impl Plan {
    fn of(noise: &mut Noise) -> Self {
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

    fn open(&mut self, wire: &Wire) -> Result<(Peer, Peer)> {
        let client = wire.road.connect()?;
        client.say(&self.client.says.next(self.early))?;
        Ok((client, wire.listener.accept()?))
    }
}

/// How an end's part comes to its end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Close {
    Finishes,
    Resets,
    IsReset,
}

/// What one end of a connection is going to do.
struct End {
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
    fn take_part(mut self, peer: Peer) -> Result<()> {
        let close = self.close;
        if self.narrow {
            peer.socket().set_recv_buffer_size(NARROW).context("narrow what can be heard")?;
            peer.socket().set_send_buffer_size(NARROW).context("narrow what can be said")?;
        }
        let done = match self.by_events {
            true => vec![self.take_part_by_events(&peer)],
            false => self.take_part_by_threads(&peer),
        };
        if close == Close::IsReset {
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
#[derive(Clone)]
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
            let fault = format!("lost, repeated or reordered bytes, {left} before the end");
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

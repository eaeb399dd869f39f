//! 64 bytes there and back on one connection: what a proxy adds to each request.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::bench::upstream::ECHO;

/// What a small request is made of.
const MESSAGE: usize = 64;
/// Round trips that are not timed: the first ones find cold caches.
const WARM_UP: u64 = 100;

/// What came out.
pub(crate) struct RoundTrips {
    /// How many were done, with those that were not timed.
    pub(crate) count: u64,
    /// How many there were in a second.
    pub(crate) per_second: f64,
    /// Half of them took at most so long.
    pub(crate) p50: Duration,
    /// All but one in a hundred took at most so long.
    pub(crate) p99: Duration,
}

/// Does round trips on one connection for `time`, checking each reply.
pub(crate) fn run(address: SocketAddr, time: Duration) -> Result<RoundTrips> {
    let mut stream = super::connect(address)?;
    for number in 0..WARM_UP {
        round_trip(&mut stream, number)?;
    }

    let mut took = Vec::with_capacity(1 << 18);
    let start = Instant::now();
    let mut last = start;
    while last - start < time {
        round_trip(&mut stream, took.len() as u64)?;
        let now = Instant::now();
        took.push(now - last);
        last = now;
    }
    took.sort_unstable();
    Ok(RoundTrips {
        count: took.len() as u64 + WARM_UP,
        per_second: took.len() as f64 / (last - start).as_secs_f64(),
        p50: took[took.len() / 2],
        p99: took[took.len() * 99 / 100],
    })
}

/// One message there and back; `number` makes it unlike the one before.
pub(super) fn round_trip(stream: &mut TcpStream, number: u64) -> Result<()> {
    let mut sent = [ECHO; MESSAGE];
    sent[MESSAGE - 8..].copy_from_slice(&number.to_le_bytes());
    stream.write_all(&sent).context("send a request")?;
    let mut received = [0; MESSAGE];
    stream.read_exact(&mut received).context("receive a reply")?;
    ensure!(sent == received, "a reply has wrong bytes");
    Ok(())
}

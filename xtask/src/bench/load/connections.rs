//! New connections: connect, one round trip, close.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::round_trips::round_trip;

/// Enough that a CPU always has something to do while a client waits for its reply.
const CLIENTS: usize = 8;

/// How many connections there were, and in what time.
pub(crate) struct Connections {
    /// How many came and went.
    pub(crate) count: usize,
    /// How long that took.
    pub(crate) took: Duration,
}

/// Opens, uses and closes connections for `time`.
pub(crate) fn run(address: SocketAddr, time: Duration) -> Result<Connections> {
    let start = Instant::now();
    let client = || -> Result<usize> {
        let mut count = 0;
        while start.elapsed() < time {
            round_trip(&mut super::connect(address)?, count as u64)?;
            count += 1;
        }
        Ok(count)
    };
    let counts = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        clients
            .into_iter()
            .map(|client| client.join().expect("a client does not panic"))
            .collect::<Result<Vec<usize>>>()
    })
    .context("open, use and close connections")?;
    Ok(Connections { count: counts.iter().sum(), took: start.elapsed() })
}

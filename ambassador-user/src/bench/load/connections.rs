//! New connections: connect, one round trip, close.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::round_trips::round_trip;
use super::{Served, Target};
use crate::bench::latency::Latency;

/// Enough that a CPU always has something to do while a client waits for its reply.
const CLIENTS: usize = 8;

/// Opens, uses and closes connections for `time`.
pub fn run<T: Target + Sync>(target: &T, time: Duration) -> Result<Served<T::Reading>> {
    let before = target.read()?;
    let start = Instant::now();
    let client = |number: usize| -> Result<Vec<Duration>> {
        let mut took = Vec::new();
        let mut last = start;
        while last - start < time {
            round_trip(&mut super::connect(target.address(number))?, took.len() as u64)?;
            let now = Instant::now();
            took.push(now - last);
            last = now;
        }
        Ok(took)
    };
    let took = thread::scope(|scope| {
        let client = &client;
        let clients: Vec<_> =
            (0..CLIENTS).map(|number| scope.spawn(move || client(number))).collect();
        clients
            .into_iter()
            .map(|client| client.join().expect("a client does not panic"))
            .collect::<Result<Vec<_>>>()
    })
    .context("open, use and close connections")?
    .concat();
    let (elapsed, spent) = (start.elapsed(), (before, target.read()?));
    let count = took.len() as u64;
    let per_second = count as f64 / elapsed.as_secs_f64();
    Ok(Served { count, per_second, latency: Latency::of(took), spent })
}

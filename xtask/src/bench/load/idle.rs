//! Connections that have been used once and wait: what a proxy, and the kernel, keep for each.

use std::thread;
use std::time::{Duration, Instant};

use ambassador::bench::load::round_trips::round_trip;
use ambassador::bench::load::{Target as _, connect};
use anyhow::{Context, Result};

use super::Target;
use crate::bench::memory::{Kernel, Memory};

/// A proxy may free memory a little after the last byte; it is given so long to come to rest.
const SETTLE: Duration = Duration::from_secs(2);

/// What is kept.
pub(crate) struct Kept {
    /// By the proxy before the first connection, and with all of them, if there is a proxy.
    pub(crate) proxy: Option<(Memory, Memory)>,
    /// By the kernel since before the first connection, for both their ends and the proxy's.
    pub(crate) kernel: Kernel,
}

/// Opens so many connections, uses each once, reads what is kept, and uses each again, because one
/// that has died costs nothing.
pub(crate) fn run(target: &Target, connections: usize) -> Result<Kept> {
    let before = (target.proxy.map(Memory::of).transpose()?, Kernel::now()?);
    let mut streams = (0..connections)
        .map(|number| {
            let mut stream = connect(target.address(number))?;
            round_trip(&mut stream, number as u64)?;
            Ok(stream)
        })
        .collect::<Result<Vec<_>>>()
        .context("open idle connections")?;
    let proxy = target.proxy.map(at_rest).transpose()?;
    let kernel = Kernel::now()?.since(before.1);
    for (number, stream) in streams.iter_mut().enumerate() {
        round_trip(stream, number as u64).context("use a connection that was idle")?;
    }
    Ok(Kept { proxy: before.0.zip(proxy), kernel })
}

/// The memory of a proxy, once it no longer changes.
fn at_rest(process: u32) -> Result<Memory> {
    let deadline = Instant::now() + SETTLE;
    let mut memory = Memory::of(process)?;
    loop {
        thread::sleep(SETTLE / 20);
        let now = Memory::of(process)?;
        if now == memory || Instant::now() > deadline {
            return Ok(now);
        }
        memory = now;
    }
}

//! Connections that have been used once and wait: what a proxy keeps for each.

use std::fs;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::round_trips::round_trip;

/// How many connections are open at once.
const CONNECTIONS: u64 = 1000;
/// A proxy may free memory a little after the last byte; it is given so long to come to rest.
const SETTLE: Duration = Duration::from_secs(2);

/// Memory of a process, in bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// All its pages that are in memory.
    pub(crate) rss: u64,
    /// The same, with each shared page divided by the number of those who share it.
    pub(crate) pss: u64,
}

/// Opens the connections, uses each once, reads the proxy's memory, and uses each again, because
/// one that has died costs nothing.
pub(crate) fn run(address: SocketAddr, proxy: Option<u32>) -> Result<Option<Memory>> {
    let mut connections = (0..CONNECTIONS)
        .map(|number| {
            let mut stream = super::connect(address)?;
            round_trip(&mut stream, number)?;
            Ok(stream)
        })
        .collect::<Result<Vec<_>>>()
        .context("open idle connections")?;
    let memory = proxy.map(at_rest).transpose()?;
    for (stream, number) in connections.iter_mut().zip(0..) {
        round_trip(stream, number).context("use a connection that was idle")?;
    }
    Ok(memory)
}

/// The memory of a process, once it no longer changes.
fn at_rest(pid: u32) -> Result<Memory> {
    let deadline = Instant::now() + SETTLE;
    let mut memory = memory(pid)?;
    loop {
        thread::sleep(SETTLE / 20);
        let now = self::memory(pid)?;
        if now == memory || Instant::now() > deadline {
            return Ok(now);
        }
        memory = now;
    }
}

fn memory(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let rollup = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let field =
        |name: &str| bytes_of(&rollup, name).with_context(|| format!("find {name} in {path}"));
    Ok(Memory { rss: field("Rss:")?, pss: field("Pss:")? })
}

/// One field of `smaps_rollup`, which is in KiB.
fn bytes_of(rollup: &str, name: &str) -> Option<u64> {
    let rest = rollup.lines().find_map(|line| line.strip_prefix(name))?;
    Some(rest.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_not_taken_for_another_that_begins_alike() {
        let rollup = "Rss:    8192 kB\nPss:    4096 kB\nPss_Dirty:    7 kB\n";
        assert_eq!(bytes_of(rollup, "Pss:"), Some(4096 * 1024));
        assert_eq!(bytes_of(rollup, "Swap:"), None);
    }
}

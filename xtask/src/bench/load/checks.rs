//! Endpoints that are checked while nobody connects: what the asking costs.

use std::fs;
use std::thread;
use std::time::Duration;

use ambassador::bench::load::Target as _;
use anyhow::{Context, Result, ensure};

use super::Target;
use crate::bench::cpu::Spent;

/// Each endpoint is asked once in so long.
pub(crate) const INTERVAL: Duration = Duration::from_secs(5);
/// Intervals that are measured, after the first one.
const INTERVALS: u32 = 2;

/// The share of a CPU that a proxy takes to check so many endpoints. Nothing where there is no proxy.
pub(crate) fn run(target: &Target, endpoints: usize) -> Result<Option<f64>> {
    if target.proxy.is_none() {
        return Ok(None);
    }
    thread::sleep(INTERVAL);
    let (before, opened) = (target.read()?, opened()?);
    thread::sleep(INTERVAL * INTERVALS);
    let (after, opened) = (target.read()?, self::opened()? - opened);
    // Intervals vary, and the last ones may not be over.
    let least = endpoints as u64 * u64::from(INTERVALS) * 8 / 10;
    ensure!(opened >= least, "{opened} connections in {INTERVALS} intervals: not all are checked");
    let spent = Spent::between((before, after)).proxy;
    Ok(spent.map(|spent| spent / (INTERVAL * INTERVALS).as_secs_f64()))
}

/// Connections that were ever begun in this network namespace.
fn opened() -> Result<u64> {
    let path = "/proc/thread-self/net/snmp";
    let snmp = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = lines.next().zip(lines.next()).context("find the counters of TCP")?;
    let mut counters = names.split(' ').zip(values.split(' '));
    let (_, value) =
        counters.find(|(name, _)| *name == "ActiveOpens").context("find what was opened")?;
    value.parse().context("parse a counter")
}

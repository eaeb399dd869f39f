//! From the start of a proxy to the first byte that has come back through its last route.

use std::time::{Duration, Instant};

use ambassador::bench::load::connect;
use ambassador::bench::load::round_trips::round_trip;
use anyhow::{Context, Result};

use super::Target;
use crate::bench::memory::Memory;

/// What a start came to.
pub(crate) struct Ready {
    /// How long it took.
    pub(crate) after: Duration,
    /// What the proxy keeps then.
    pub(crate) memory: Memory,
}

/// Waits for the first reply. Nothing where there is no proxy to start.
pub(crate) fn run(target: &Target) -> Result<Option<Ready>> {
    let last = target.addresses.last().context("find the last route")?;
    round_trip(&mut connect(*last)?, 0)?;
    let now = Instant::now();
    let ready = target
        .proxy
        .map(|process| Ok(Ready { after: now - target.started, memory: Memory::of(process)? }));
    ready.transpose()
}

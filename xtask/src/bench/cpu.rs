//! What a measurement costs: how long its CPUs and the processes of a proxy were busy.

use std::time::Instant;

use ambassador::bench::cpu::{Busy, Cpus, running, times_of};
use ambassador_tests::family;
use anyhow::Result;

/// What something cost.
#[derive(Clone, Copy)]
pub(crate) struct Spent {
    /// Seconds of the two CPUs that are measured, the kernel's work outside any process included.
    pub(crate) machine: f64,
    /// Seconds of the proxy's processes, if there is a proxy.
    pub(crate) proxy: Option<f64>,
    /// How busy the upstream's CPU was, from 0 to 1: near 1, it is the server that is measured.
    pub(crate) upstream_busy: f64,
}

/// Seconds of CPU time since the machine and the proxy were started, at one time.
pub(crate) struct Reading {
    at: Instant,
    busy: Busy,
    proxy: Option<f64>,
}

impl Reading {
    /// What these CPUs and the proxy, if there is one, have taken until now.
    pub(crate) fn now(cpus: Cpus, proxy: Option<u32>) -> Result<Self> {
        let busy = Busy::now(cpus)?;
        let proxy = proxy.map(of_family).transpose()?;
        Ok(Self { at: Instant::now(), busy, proxy })
    }
}

impl Spent {
    /// From one reading to a later one.
    pub(crate) fn between((before, after): (Reading, Reading)) -> Self {
        let took = (after.at - before.at).as_secs_f64();
        Self {
            machine: after.busy.both - before.busy.both,
            proxy: after.proxy.zip(before.proxy).map(|(after, before)| after - before),
            upstream_busy: (after.busy.upstream - before.busy.upstream) / took,
        }
    }
}

/// What a process and its descendants have taken, those that have ended included.
fn of_family(process: u32) -> Result<f64> {
    let [.., user, system] = times_of(process)?;
    let mut sum = user + system;
    for member in family::of(process) {
        // One that has ended meanwhile is left to the next reading, where its parent has its time.
        sum += running(member).map_or(0.0, |it| it.as_secs_f64());
    }
    Ok(sum)
}

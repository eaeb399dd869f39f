//! The figures that come out of a load: of [those of the product](ambassador::bench::load) as of those that
//! only this benchmark has.
//!
//! A load either gives its figures or fails: a reply that is lost or wrong, or no progress for
//! [`STALL`](ambassador::bench::load::STALL), is never just a slow result.

pub(crate) mod checks;
pub(crate) mod failover;
pub(crate) mod idle;
pub(crate) mod pgbench;
pub(crate) mod redis;
pub(crate) mod reload;
pub(crate) mod start_up;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambassador::bench::cpu::Cpus;
use ambassador::bench::latency::Latency;
use ambassador::bench::load::{self, connections, round_trips, transfer};
use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::catalogue::{Kind, Load};
use super::cpu::{Reading, Spent};
use super::failing::Failing;
use super::subject::reload::Reload;

/// One number that a load gives.
#[derive(Debug)]
pub(crate) struct Figure {
    /// What it is called in the table and in the results file.
    pub(crate) name: &'static str,
    /// Decimals worth printing.
    pub(crate) decimals: usize,
    /// Which way is better: as an arrow.
    pub(crate) better: char,
}

/// Where a load is sent, and where its cost is read.
#[derive(Clone)]
pub(crate) struct Target {
    /// What the client connects to: each leads to the upstream.
    pub(crate) addresses: Vec<SocketAddr>,
    /// The proxy's process, unless there is none.
    pub(crate) proxy: Option<u32>,
    /// When that was started.
    pub(crate) started: Instant,
    /// How it is told that a route has moved, if that is to be done.
    pub(crate) reload: Option<Reload>,
    /// The server that is to fail, and where the one is that takes over, if that is to be done.
    pub(crate) failing: Option<Arc<(Failing, SocketAddr)>>,
    /// The CPUs that do the work.
    pub(crate) cpus: Cpus,
}

/// How much is asked for.
#[derive(Clone, Copy)]
pub(crate) struct Scale {
    /// How long a load runs that counts what it gets done.
    pub(crate) time: Duration,
    /// How many bytes a transfer moves.
    pub(crate) bytes: u64,
    /// How many requests redis-benchmark sends; eight times as many when they are pipelined, a
    /// fifth as transactions of PostgreSQL.
    pub(crate) requests: u64,
}

/// Requests that were all answered.
pub(crate) type Served = load::Served<Reading>;

/// What came out of a load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// By their names; one is missing where there is nothing to measure, such as a proxy.
    pub(crate) figures: BTreeMap<String, f64>,
    /// How busy the upstream's CPU was, from 0 to 1: near 1, it is the server that is measured.
    pub(crate) upstream_busy: Option<f64>,
    /// How long requests took, where there were any.
    pub(crate) latency: Option<Latency>,
}

impl Load {
    /// The figures it gives, the most important one first.
    pub(crate) fn figures(self) -> &'static [Figure] {
        const fn figure(name: &'static str, decimals: usize, better: char) -> Figure {
            Figure { name, decimals, better }
        }
        match self.kind {
            Kind::Redis { .. }
            | Kind::Postgres { .. }
            | Kind::RoundTrips { .. }
            | Kind::Connections => {
                const {
                    &[
                        figure("per second", 0, '↑'),
                        figure("p50 µs", 1, '↓'),
                        figure("p99 µs", 1, '↓'),
                        figure("p99.9 µs", 1, '↓'),
                        figure("CPU s/10k", 3, '↓'),
                        figure("proxy CPU s/10k", 3, '↓'),
                    ]
                }
            }
            Kind::Transfer { .. } => {
                const {
                    &[
                        figure("GB/s", 2, '↑'),
                        figure("CPU s/GB", 3, '↓'),
                        figure("proxy CPU s/GB", 3, '↓'),
                    ]
                }
            }
            Kind::Idle { .. } => {
                const {
                    &[
                        figure("RSS KiB/connection", 2, '↓'),
                        figure("RSS MiB", 2, '↓'),
                        figure("PSS MiB", 2, '↓'),
                        figure("TCP buffers MiB", 2, '↓'),
                        figure("kernel objects MiB", 1, '↓'),
                    ]
                }
            }
            Kind::StartUp => const { &[figure("ready ms", 2, '↓'), figure("RSS MiB", 2, '↓')] },
            Kind::Reload => {
                const {
                    &[
                        figure("reload ms", 1, '↓'),
                        figure("p99.9 µs before", 0, '↓'),
                        figure("p99.9 µs meanwhile", 0, '↓'),
                        figure("meanwhile/before", 2, '↓'),
                    ]
                }
            }
            Kind::Checks => const { &[figure("CPU of a core %", 2, '↓')] },
            Kind::Failover { .. } => {
                const {
                    &[
                        figure("first success ms", 1, '↓'),
                        figure("all served ms", 1, '↓'),
                        figure("failed calls", 0, '↓'),
                        figure("not connected", 0, '↓'),
                    ]
                }
            }
        }
    }

    /// Runs the load on the calling thread and those it starts.
    pub(crate) fn run(self, target: &Target, scale: Scale) -> Result<Outcome> {
        match self.kind {
            Kind::Redis { pipeline } => {
                let requests = scale.requests * if pipeline == 1 { 1 } else { 8 };
                Ok(self.served(redis::run(target, requests, pipeline)?))
            }
            Kind::Postgres { clients } => {
                Ok(self.served(pgbench::run(target, scale.requests / 5, clients)?))
            }
            Kind::RoundTrips { connections, size } => {
                Ok(self.served(round_trips::run(target, connections, size, scale.time)?))
            }
            Kind::Connections => Ok(self.served(connections::run(target, scale.time)?)),
            Kind::Transfer { direction, streams } => {
                let moved = transfer::run(target, direction, scale.bytes, streams)?;
                let gigabytes = scale.bytes as f64 / 1e9;
                let Spent { machine, proxy, upstream_busy } = Spent::between(moved.spent);
                let values = [
                    Some(gigabytes / moved.took.as_secs_f64()),
                    Some(machine / gigabytes),
                    proxy.map(|spent| spent / gigabytes),
                ];
                Ok(self.outcome(values, Some(upstream_busy), None))
            }
            Kind::Idle { connections } => {
                let idle::Kept { proxy, kernel } = idle::run(target, connections)?;
                let each = |(before, with): (u64, u64)| {
                    with.saturating_sub(before) as f64 / 1024.0 / connections as f64
                };
                let values = [
                    proxy.map(|(before, with)| each((before.rss, with.rss))),
                    proxy.map(|(_, with)| mebibytes(with.rss)),
                    proxy.map(|(_, with)| mebibytes(with.pss)),
                    Some(mebibytes(kernel.buffers)),
                    Some(mebibytes(kernel.objects)),
                ];
                Ok(self.outcome(values, None, None))
            }
            Kind::StartUp => {
                let ready = start_up::run(target)?;
                let values = [
                    ready.as_ref().map(|ready| ready.after.as_secs_f64() * 1e3),
                    ready.as_ref().map(|ready| mebibytes(ready.memory.rss)),
                ];
                Ok(self.outcome(values, None, None))
            }
            Kind::Reload => {
                // The tail needs more requests than a second has.
                let reload::Reloaded { took, before, meanwhile } =
                    reload::run(target, 2 * scale.time)?;
                let tails = [&before, &meanwhile].map(|latency| latency.at(0.999));
                let values = [
                    took.map(|took| took.as_secs_f64() * 1e3),
                    tails[0],
                    tails[1],
                    tails[1].zip(tails[0]).map(|(meanwhile, before)| meanwhile / before),
                ];
                Ok(self.outcome(values, None, Some(meanwhile)))
            }
            Kind::Checks => {
                let share = checks::run(target, self.routes)?;
                Ok(self.outcome([share.map(|share| share * 100.0)], None, None))
            }
            Kind::Failover { dialect, .. } => {
                let failed_over = failover::run(target, dialect)?;
                let values = [
                    failed_over.first.as_secs_f64() * 1e3,
                    failed_over.all.as_secs_f64() * 1e3,
                    failed_over.failed as f64,
                    failed_over.not_connected as f64,
                ];
                Ok(self.outcome(values.map(Some), None, None))
            }
        }
    }

    fn served(self, served: Served) -> Outcome {
        let Served { count, per_second, latency, spent } = served;
        let spent = Spent::between(spent);
        let ten_thousands = count as f64 / 1e4;
        let values = [
            Some(per_second),
            latency.at(0.5),
            latency.at(0.99),
            latency.at(0.999),
            Some(spent.machine / ten_thousands),
            spent.proxy.map(|spent| spent / ten_thousands),
        ];
        self.outcome(values, Some(spent.upstream_busy), Some(latency))
    }

    fn outcome<const N: usize>(
        self,
        values: [Option<f64>; N],
        upstream_busy: Option<f64>,
        latency: Option<Latency>,
    ) -> Outcome {
        let names = self.figures().iter().map(|figure| figure.name.to_owned());
        let figures = names.zip(values).filter_map(|(name, value)| Some((name, value?))).collect();
        Outcome { figures, upstream_busy, latency }
    }
}

impl load::Target for Target {
    type Reading = Reading;

    fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    fn read(&self) -> Result<Reading> {
        Reading::now(self.cpus, self.proxy)
    }
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use ambassador::bench::upstream::Upstream;

    use super::*;
    use crate::bench::catalogue::{LOADS, Service};

    const BYTES: u64 = 1 << 20;

    fn upstream() -> Upstream {
        Upstream::start(Ipv4Addr::LOCALHOST.into()).expect("start an upstream")
    }

    fn target(address: SocketAddr) -> Target {
        let cpus = Cpus::choose().expect("choose CPUs");
        Target {
            addresses: vec![address],
            proxy: None,
            started: Instant::now(),
            reload: None,
            failing: None,
            cpus,
        }
    }

    #[test]
    fn every_load_of_the_built_in_upstream_passes_without_a_proxy() {
        let upstream = upstream();
        let target = target(upstream.address());
        let scale = Scale { time: Duration::from_millis(10), bytes: BYTES, requests: 1 };
        // More connections than a test may have descriptors are left to the benchmark itself.
        let loads = LOADS
            .iter()
            .filter(|load| load.service() == Service::BuiltIn && load.connections() <= 64);
        let mut tried = 0;
        for load in loads {
            let outcome = load.run(&target, scale);
            let outcome = outcome.unwrap_or_else(|error| panic!("{}: {error:#}", load.name));
            let first = load.figures()[0].name;
            let counts = !matches!(
                load.kind,
                Kind::StartUp | Kind::Idle { .. } | Kind::Reload | Kind::Checks
            );
            assert_eq!(
                outcome.figures.get(first).is_some_and(|&it| it > 0.0),
                counts,
                "{}",
                load.name
            );
            tried += 1;
        }
        assert!(tried > 8);
    }
}

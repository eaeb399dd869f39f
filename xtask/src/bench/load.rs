//! The loads: what a client does to a way through, and the figures that come out of it.
//!
//! A load either gives its figures or fails: a reply that is lost or wrong, or no progress for
//! [`STALL`], is never just a slow result.

pub(crate) mod connections;
pub(crate) mod idle;
pub(crate) mod pgbench;
pub(crate) mod redis;
pub(crate) mod round_trips;
pub(crate) mod start_up;
pub(crate) mod transfer;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::catalogue::{Kind, Load};
use super::cpu::{Cpus, Meter, Spent};
use super::latency::Latency;

/// Without a byte for so long, a connection counts as stalled.
const STALL: Duration = Duration::from_secs(5);

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
pub(crate) struct Served {
    /// How many there were.
    pub(crate) count: u64,
    /// How many in a second.
    pub(crate) per_second: f64,
    /// How long they took.
    pub(crate) latency: Latency,
    /// What they cost.
    pub(crate) spent: Spent,
}

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
                let Spent { machine, proxy, upstream_busy } = moved.spent;
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
        }
    }

    fn served(self, served: Served) -> Outcome {
        let Served { count, per_second, latency, spent } = served;
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

impl Target {
    /// Where the connection with this number goes.
    fn address(&self, number: usize) -> SocketAddr {
        self.addresses[number % self.addresses.len()]
    }

    /// Starts counting what is spent.
    fn meter(&self) -> Result<Meter> {
        Meter::start(self.cpus, self.proxy)
    }
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Connects a client. Its reads and writes fail when nothing moves for [`STALL`].
fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, STALL)
        .with_context(|| format!("connect to {address}"))?;
    stream.set_nodelay(true).context("set up a connection")?;
    stream.set_read_timeout(Some(STALL)).context("set up a connection")?;
    stream.set_write_timeout(Some(STALL)).context("set up a connection")?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, Shutdown, TcpListener};
    use std::thread;

    use super::*;
    use crate::bench::catalogue::{LOADS, Service};
    use crate::bench::upstream::Upstream;
    use transfer::Direction;

    const BYTES: u64 = 1 << 20;

    fn upstream() -> Upstream {
        Upstream::start(Ipv4Addr::LOCALHOST.into()).expect("start an upstream")
    }

    /// A proxy for one connection, which changes the byte at this place each way.
    fn tampering(upstream: SocketAddr, place: usize) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("listen");
        let address = listener.local_addr().expect("read the address");
        thread::spawn(move || {
            let (client, _) = listener.accept().expect("accept");
            let server = TcpStream::connect(upstream).expect("connect");
            let back = (server.try_clone().expect("clone"), client.try_clone().expect("clone"));
            let way = move |(mut from, mut to): (TcpStream, TcpStream)| {
                let mut buffer = [0; 4096];
                let mut moved = 0;
                while let Ok(got @ 1..) = from.read(&mut buffer) {
                    if let Some(byte) =
                        place.checked_sub(moved).and_then(|at| buffer[..got].get_mut(at))
                    {
                        *byte = byte.wrapping_add(1);
                    }
                    moved += got;
                    if to.write_all(&buffer[..got]).is_err() {
                        break;
                    }
                }
                let _ = to.shutdown(Shutdown::Both);
            };
            thread::spawn(move || way(back));
            way((client, server));
        });
        address
    }

    fn target(address: SocketAddr) -> Target {
        let cpus = Cpus::choose().expect("choose CPUs");
        Target { addresses: vec![address], proxy: None, started: Instant::now(), cpus }
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
            let counts = !matches!(load.kind, Kind::StartUp | Kind::Idle { .. });
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

    #[test]
    fn a_changed_byte_fails_a_transfer_and_is_named() {
        let upstream = upstream();
        // Past the request, which goes the same way as the upload.
        let up = target(tampering(upstream.address(), 9 + 70_000));
        let down = target(tampering(upstream.address(), 70_000));
        let error = |target, direction| {
            transfer::run(target, direction, BYTES, 1).err().expect("wrong").to_string()
        };
        assert_eq!(error(&up, Direction::Up), "byte 70000 of the upload arrived wrong");
        assert_eq!(error(&down, Direction::Down), "byte 70000 of the download arrived wrong");
    }

    #[test]
    fn a_changed_byte_fails_a_round_trip() {
        let upstream = upstream();
        let target = target(tampering(upstream.address(), 6400));
        let done = round_trips::run(&target, 1, 4096, Duration::from_secs(5));
        assert_eq!(done.err().expect("wrong").to_string(), "a reply has wrong bytes");
    }

    #[test]
    fn one_silent_connection_of_many_fails_the_load() {
        let upstream = upstream();
        let mut target = target(upstream.address());
        // It answers the greeting, and nothing after that.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("listen");
        target.addresses.push(listener.local_addr().expect("read the address"));
        let silent = thread::spawn(move || {
            let (mut client, _) = listener.accept().expect("accept");
            let mut greeting = [0; 64];
            client.read_exact(&mut greeting).expect("read the greeting");
            client.write_all(&greeting).expect("answer the greeting");
            // Until the client gives up.
            while client.read(&mut greeting).is_ok_and(|got| got > 0) {}
        });
        let done = round_trips::run(&target, 2, 64, Duration::from_millis(10));
        let error = done.err().expect("silence").to_string();
        assert_eq!(error, "no reply on 1 of 2 connections in 5s");
        silent.join().expect("the silent server ends");
    }
}

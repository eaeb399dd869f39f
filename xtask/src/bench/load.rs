//! The loads: what a client does to a way through, and the figures that come out of it.
//!
//! A load either gives its figures or fails: a reply that is lost or wrong, or no progress for
//! [`STALL`], is never just a slow result.

pub(crate) mod connections;
pub(crate) mod idle;
pub(crate) mod redis;
pub(crate) mod round_trips;
pub(crate) mod transfer;

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::cpu::{Cpus, Meter};

/// Without a byte for so long, a connection counts as stalled.
const STALL: Duration = Duration::from_secs(5);

/// What can be measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Load {
    /// redis-benchmark, GET, 50 connections
    Get,
    /// redis-benchmark, GET, 50 connections, 16 requests in flight on each
    GetPipelined,
    /// 64 bytes there and back on one connection, one at a time
    RoundTrips,
    /// One connection that sends as fast as it can
    Upload,
    /// One connection that receives as fast as it can
    Download,
    /// Connect, one round trip, close, by eight clients at once
    Connections,
    /// A thousand connections that have done one round trip each and wait
    Idle,
}

/// One number that a load gives.
pub(crate) struct Figure {
    /// What it is called in the table and in the results file.
    pub(crate) name: &'static str,
    /// Decimals worth printing.
    pub(crate) decimals: usize,
    /// Which way is better: as an arrow.
    pub(crate) better: char,
}

/// Where a load is sent, and where its cost is read.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    /// What the client connects to.
    pub(crate) address: SocketAddr,
    /// The proxy's process, unless there is none.
    pub(crate) proxy: Option<u32>,
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
    /// How many requests redis-benchmark sends; eight times as many when they are pipelined.
    pub(crate) requests: u64,
}

/// What came out of a load.
pub(crate) struct Outcome {
    /// One value for each of the load's figures; none where there is no proxy to look at.
    pub(crate) values: Vec<Option<f64>>,
    /// How busy the upstream's CPU was, from 0 to 1: near 1, it is the server that is measured.
    pub(crate) upstream_busy: f64,
}

impl Load {
    /// The name on the command line and in the results file.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().expect("no load is hidden").get_name().to_owned()
    }

    /// What is measured, for a heading.
    pub(crate) fn title(self) -> String {
        let value = self.to_possible_value().expect("no load is hidden");
        value.get_help().expect("every load has a description").to_string()
    }

    /// Whether it speaks to Redis, and not to the built-in upstream.
    pub(crate) fn wants_redis(self) -> bool {
        matches!(self, Self::Get | Self::GetPipelined)
    }

    /// The figures it gives, in the order of [`Outcome::values`].
    pub(crate) fn figures(self) -> &'static [Figure] {
        const fn figure(name: &'static str, decimals: usize, better: char) -> Figure {
            Figure { name, decimals, better }
        }
        match self {
            Self::Get | Self::GetPipelined => {
                const {
                    &[
                        figure("requests/s", 0, '↑'),
                        figure("p50 ms", 3, '↓'),
                        figure("p99 ms", 3, '↓'),
                        figure("proxy CPU s per 1M", 2, '↓'),
                    ]
                }
            }
            Self::RoundTrips => {
                const {
                    &[
                        figure("round trips/s", 0, '↑'),
                        figure("p50 µs", 1, '↓'),
                        figure("p99 µs", 1, '↓'),
                        figure("proxy CPU s per 1M", 2, '↓'),
                    ]
                }
            }
            Self::Upload | Self::Download => {
                const {
                    &[
                        figure("GB/s", 2, '↑'),
                        figure("CPU s/GB", 3, '↓'),
                        figure("proxy CPU s/GB", 3, '↓'),
                    ]
                }
            }
            Self::Connections => {
                const { &[figure("connections/s", 0, '↑'), figure("proxy CPU s per 100k", 2, '↓')] }
            }
            Self::Idle => const { &[figure("RSS MiB", 2, '↓'), figure("PSS MiB", 2, '↓')] },
        }
    }

    /// Runs the load on the calling thread and those it starts.
    pub(crate) fn run(self, target: Target, scale: Scale) -> Result<Outcome> {
        let Target { address, proxy, cpus } = target;
        let start = Instant::now();
        let meter = Meter::start(cpus, proxy)?;
        let values = match self {
            Self::Get | Self::GetPipelined => {
                let pipeline = if self == Self::Get { 1 } else { 16 };
                let requests = scale.requests * if self == Self::Get { 1 } else { 8 };
                let done = redis::run(address, requests, pipeline)?;
                let proxy = meter.read()?.proxy.map(|spent| spent * 1e6 / requests as f64);
                vec![Some(done.per_second), Some(done.p50), Some(done.p99), proxy]
            }
            Self::RoundTrips => {
                let done = round_trips::run(address, scale.time)?;
                let proxy = meter.read()?.proxy.map(|spent| spent * 1e6 / done.count as f64);
                let [p50, p99] = [done.p50, done.p99].map(|took| Some(took.as_secs_f64() * 1e6));
                vec![Some(done.per_second), p50, p99, proxy]
            }
            Self::Upload | Self::Download => {
                let transfer =
                    if self == Self::Upload { transfer::upload } else { transfer::download };
                let took = transfer(address, scale.bytes)?;
                let gigabytes = scale.bytes as f64 / 1e9;
                let spent = meter.read()?;
                vec![
                    Some(gigabytes / took.as_secs_f64()),
                    Some(spent.machine / gigabytes),
                    spent.proxy.map(|spent| spent / gigabytes),
                ]
            }
            Self::Connections => {
                let done = connections::run(address, scale.time)?;
                let proxy = meter.read()?.proxy.map(|spent| spent * 1e5 / done.count as f64);
                vec![Some(done.count as f64 / done.took.as_secs_f64()), proxy]
            }
            Self::Idle => {
                let memory = idle::run(address, proxy)?;
                let mebibytes = |bytes| bytes as f64 / f64::from(1 << 20);
                vec![
                    memory.map(|memory| mebibytes(memory.rss)),
                    memory.map(|memory| mebibytes(memory.pss)),
                ]
            }
        };
        let upstream_busy = meter.read()?.upstream / start.elapsed().as_secs_f64();
        Ok(Outcome { values, upstream_busy })
    }
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
    use crate::bench::upstream::Upstream;

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

    #[test]
    fn every_load_of_the_built_in_upstream_passes_without_a_proxy() {
        let upstream = upstream();
        let cpus = Cpus::choose().expect("choose CPUs");
        let target = Target { address: upstream.address(), proxy: None, cpus };
        let scale = Scale { time: Duration::from_millis(10), bytes: BYTES, requests: 1 };
        // Idle opens more connections than a test may have descriptors.
        let loads = [Load::RoundTrips, Load::Upload, Load::Download, Load::Connections];
        for load in loads {
            let outcome = load.run(target, scale);
            let values = outcome.map_or_else(
                |error| panic!("{}: {error:#}", load.name()),
                |outcome| outcome.values,
            );
            assert_eq!(values.len(), load.figures().len());
            assert!(values[0].is_some_and(|value| value > 0.0), "{}", load.name());
        }
    }

    #[test]
    fn a_changed_byte_fails_a_transfer_and_is_named() {
        let upstream = upstream();
        // Past the request, which goes the same way as the upload.
        let up = transfer::upload(tampering(upstream.address(), 9 + 70_000), BYTES);
        let down = transfer::download(tampering(upstream.address(), 70_000), BYTES);
        assert_eq!(up.expect_err("wrong").to_string(), "byte 70000 of the upload arrived wrong");
        assert_eq!(
            down.expect_err("wrong").to_string(),
            "byte 70000 of the download arrived wrong"
        );
    }

    #[test]
    fn a_changed_byte_fails_a_round_trip() {
        let upstream = upstream();
        let done = round_trips::run(tampering(upstream.address(), 640), Duration::from_secs(5));
        assert_eq!(done.err().expect("wrong").to_string(), "a reply has wrong bytes");
    }
}

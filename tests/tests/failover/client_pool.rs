//! A real client's pool of connections under load: `client_pool.py`, and what it tells.

use std::net::SocketAddr;

use ambassador_tests::place::Place;
use ambassador_tests::process::Process;
use ambassador_tests::wait::{SOON, until_true};
use anyhow::{Context, Result};

/// Debian's, which finds what Debian has packaged.
pub(crate) const PYTHON: &str = "/usr/bin/python3";

/// A running pool, each of whose members writes again and again.
pub(crate) struct ClientPool {
    process: Process,
    members: usize,
}

/// What became of a pool's load.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// All writes, those of each member in order.
    pub(crate) writes: Vec<Write>,
    /// Why connections could not be made.
    pub(crate) unconnected: Vec<String>,
}

/// One write.
#[derive(Debug)]
pub(crate) struct Write {
    member: usize,
    /// Of the write, like no other's.
    pub(crate) name: String,
    /// The port of the server that has acknowledged it, or why nobody did.
    pub(crate) outcome: Result<u16, String>,
}

impl ClientPool {
    /// Of this kind, with so many connections to a route, and threads that use them.
    pub(crate) fn start(kind: &str, route: SocketAddr, members: usize) -> Result<Self> {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/failover/client_pool.py");
        let mut command = Place::here().command(PYTHON);
        command.args([file, kind, &route.ip().to_string(), &route.port().to_string()]);
        Ok(Self { process: Process::start(command.arg(members.to_string()))?, members })
    }

    /// Waits until the server on this port has acknowledged the last writes of every member, so many at least.
    pub(crate) fn until_written_to(&mut self, port: u16, writes: usize) -> Result<()> {
        until_true(&format!("{writes} writes of each to port {port}"), || {
            self.process.still_runs()?;
            let mut in_a_row = vec![0; self.members];
            for Write { member, outcome, .. } in told(&self.process.stdout())?.writes {
                in_a_row[member] = if outcome == Ok(port) { in_a_row[member] + 1 } else { 0 };
            }
            Ok(in_a_row.iter().all(|it| *it >= writes))
        })
        .with_context(|| format!("its errors were: {}", self.process.stderr()))
    }

    /// Ends it, and says what became of all. An error if there was a wrong answer.
    pub(crate) fn end(self) -> Result<Told> {
        self.process.signal(libc::SIGTERM)?;
        told(&self.process.finish(SOON)?.success()?)
    }
}

/// What it has told so far, up to the last line that is complete.
fn told(text: &str) -> Result<Told> {
    let mut told = Told::default();
    for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
        if let Some(why) = line.strip_prefix("unconnected ") {
            told.unconnected.push(why.to_owned());
            continue;
        }
        let mut words = line.splitn(3, ' ');
        let mut next = || words.next().with_context(|| format!("read {line:?}"));
        let (member, number, outcome) = (next()?, next()?, next()?);
        let outcome = outcome.parse().map_err(|_| outcome.to_owned());
        let name = format!("{member}-{number}");
        told.writes.push(Write { member: member.parse().context("read a number")?, name, outcome });
    }
    Ok(told)
}

//! Another configuration for a proxy that runs: put where it reads it, and told by a signal.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::Order;

/// Moves the last route of a proxy to another address, and back.
#[derive(Clone)]
pub(crate) struct Reload {
    process: u32,
    signal: Signal,
    file: PathBuf,
    /// That of the start first.
    versions: [Version; 2],
}

/// One of the configurations.
#[derive(Clone)]
pub(crate) struct Version {
    /// Where the last route listens.
    last: Option<SocketAddr>,
    text: String,
}

/// What a reload changes.
pub(crate) struct Move {
    /// Where nobody must listen any more.
    pub(crate) from: SocketAddr,
    /// Where the route must answer.
    pub(crate) to: SocketAddr,
}

impl Version {
    /// What a file says about this order.
    pub(super) fn of(order: &Order, text: String) -> Self {
        Self { last: order.listen.last().copied(), text }
    }
}

impl Reload {
    pub(super) fn new(process: u32, signal: Signal, file: PathBuf, versions: [Version; 2]) -> Self {
        Self { process, signal, file, versions }
    }

    /// Writes what the next reload reads; `turn` counts them from 0 on. Renamed into its place, because some
    /// look at the file by themselves, and must not see half of it.
    pub(crate) fn prepare(&self, turn: usize) -> Result<Move> {
        let [before, after] = [turn, turn + 1].map(|turn| &self.versions[turn % 2]);
        let new = self.file.with_extension("new");
        fs::write(&new, &after.text).context("write another configuration")?;
        fs::rename(&new, &self.file).context("put another configuration in its place")?;
        let last = |version: &Version| version.last.context("find the last route");
        Ok(Move { from: last(before)?, to: last(after)? })
    }

    /// Tells the proxy.
    pub(crate) fn signal(&self) -> Result<()> {
        let process = Pid::from_raw(self.process.cast_signed()).context("find the proxy")?;
        kill_process(process, self.signal).context("tell the proxy to reload")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_route_moves_there_and_back() {
        let directory = tempfile::tempdir().expect("create a directory");
        let file = directory.path().join("configuration.yaml");
        let [home, away] = [1, 2].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let version = |last: SocketAddr| Version { last: Some(last), text: last.to_string() };
        let reload = Reload::new(0, Signal::HUP, file.clone(), [version(home), version(away)]);
        for (turn, from, to) in [(0, home, away), (1, away, home), (2, home, away)] {
            let moved = reload.prepare(turn).expect("write");
            assert_eq!((moved.from, moved.to), (from, to));
            assert_eq!(fs::read_to_string(&file).expect("read"), to.to_string());
        }
    }
}

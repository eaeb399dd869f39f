//! A server that fails, in one of the ways that servers fail, and is well again afterwards.

use std::net::SocketAddr;

use ambassador_tests::family;
use ambassador_tests::place::Place;
use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

/// A way to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// kill -9: the kernel closes what it has open.
    Killed,
    /// SIGSTOP: the kernel still accepts connections and bytes for it, and nobody answers.
    Stopped,
    /// What is sent to it is dropped on the way.
    Unreachable,
    /// Connections are accepted, and reset with the first byte.
    Resetting,
}

impl Failure {
    /// Whether it is the way to the server that fails.
    pub(crate) fn is_on_the_way(self) -> bool {
        matches!(self, Self::Unreachable | Self::Resetting)
    }
}

/// A server that is about to fail.
pub(crate) struct Failing {
    failure: Failure,
    place: Place,
    /// Its process.
    process: u32,
    /// Where it listens.
    pub(crate) address: SocketAddr,
}

impl Failing {
    /// A server in a place that is to fail so; nothing happens yet.
    pub(crate) fn new(failure: Failure, place: &Place, process: u32, address: SocketAddr) -> Self {
        Self { failure, place: place.clone(), process, address }
    }

    /// Now it fails.
    pub(crate) fn fail(&self) -> Result<()> {
        match self.failure {
            // Those that serve for it end by themselves then.
            Failure::Killed => signal(self.process, Signal::KILL),
            Failure::Stopped => self.signal_all(Signal::STOP),
            Failure::Unreachable => self.filter("drop"),
            Failure::Resetting => self.filter("tcp flags & syn == 0 reject with tcp reset"),
        }
    }

    /// To all of its processes, the first one first: it could replace the others.
    fn signal_all(&self, of: Signal) -> Result<()> {
        family::of(self.process).into_iter().try_for_each(|process| signal(process, of))
    }

    /// Has this done with what comes to it.
    fn filter(&self, verdict: &str) -> Result<()> {
        self.place.filter(&format!(
            "table inet failing {{ chain in {{ type filter hook input priority 0; \
             tcp dport {} {verdict}; }}; }}",
            self.address.port()
        ))
    }
}

impl Drop for Failing {
    /// One that is stopped could not end, and the next one may have its port.
    fn drop(&mut self) {
        let healed = match self.failure {
            Failure::Killed => Ok(()),
            Failure::Stopped => self.signal_all(Signal::CONT),
            // Where it does not exist, it is not removed.
            Failure::Unreachable | Failure::Resetting => {
                self.place.filter("table inet failing; delete table inet failing")
            }
        };
        if let Err(error) = healed {
            eprintln!("xtask: {error:#}");
        }
    }
}

/// One that has ended meanwhile needs none.
fn signal(process: u32, signal: Signal) -> Result<()> {
    let process = Pid::from_raw(process.cast_signed()).context("find a server")?;
    match kill_process(process, signal) {
        Err(error) if error != Errno::SRCH => Err(error).context("signal a server"),
        _ => Ok(()),
    }
}

//! A server that can be hurt in many ways, and what has become of the conversations it had.

use std::net::SocketAddr;

use ambassador_tests::address::Address;
use ambassador_tests::place::{FIRST_SYN, Place};
use ambassador_tests::process::Process;
use ambassador_tests::wait::{SOON, until};
use anyhow::{Context, Result};

/// A server, and what those before it in its place have reported.
pub(crate) struct Server {
    number: usize,
    address: SocketAddr,
    place: Place,
    process: Option<Process>,
    reported: String,
}

impl Server {
    /// One that serves.
    pub(crate) fn new(number: usize, address: SocketAddr, place: &Place) -> Result<Self> {
        let (place, reported) = (place.clone(), String::new());
        let mut server = Self { number, address, place, process: None, reported };
        server.start(false)?;
        Ok(server)
    }

    /// Starts it, so that it serves or resets whoever comes.
    pub(crate) fn start(&mut self, is_rude: bool) -> Result<()> {
        let mut command = self.place.command(env!("CARGO_BIN_EXE_conversing"));
        command.arg(self.number.to_string()).arg(self.address.to_string());
        command.args(is_rude.then_some("rude"));
        let mut process = Process::start(&mut command)?;
        let address = Address::from(self.address);
        until("a server", SOON, || {
            process.still_runs()?;
            Ok(self.place.enter(|| address.connect()).ok())
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Ends it without a warning.
    pub(crate) fn kill(&mut self) -> Result<()> {
        let process = self.process.take().context("find the server")?;
        process.signal(libc::SIGKILL)?;
        self.reported += &process.finish(SOON)?.stdout;
        // A line that was cut is none.
        self.reported.truncate(self.reported.rfind('\n').map_or(0, |end| end + 1));
        Ok(())
    }

    pub(crate) fn signal(&self, signal: libc::c_int) -> Result<()> {
        self.process.as_ref().context("find the server")?.signal(signal)
    }

    /// Has packets to it dropped, until that is lifted.
    pub(crate) fn blackhole(&self) -> Result<()> {
        self.drop_what("")
    }

    /// The same, of the first one of each connection: the next one comes after a second.
    pub(crate) fn slow_handshakes(&self) -> Result<()> {
        self.drop_what(FIRST_SYN)
    }

    /// Has all packets arrive again.
    pub(crate) fn lift(&self) -> Result<()> {
        self.place.filter(&format!("delete table inet {}", self.table()))
    }

    /// All conversations that it, or one before it, has had to an end.
    pub(crate) fn reports(&self) -> String {
        let current = self.process.as_ref().map(Process::stdout).unwrap_or_default();
        format!("{}{current}", self.reported)
    }

    fn drop_what(&self, matches: &str) -> Result<()> {
        let to = self.address.ip();
        self.place.drop_arriving(&self.table(), &format!("ip daddr {to} {matches}"))
    }

    fn table(&self) -> String {
        format!("server{}", self.number)
    }
}

//! Redis.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::{accepting, program};
use crate::address::Address;
use crate::peer::Peer;
use crate::place::Place;
use crate::process::Process;
use crate::way::Bytes;

/// A Redis server that keeps nothing.
#[derive(Debug)]
pub struct Redis {
    /// Its process.
    pub process: Process,
    /// Where it listens.
    pub address: SocketAddr,
    /// The Unix socket where it listens too.
    pub socket: Address,
    _directory: TempDir,
}

/// A connection past everybody, on which a server tells what others ask of it.
#[derive(Debug)]
pub struct Ledger {
    teller: Peer,
}

/// What a server was asked by all but its teller.
#[derive(Debug)]
pub struct Asked {
    /// How many connections it accepted.
    pub connections: u64,
    /// What it read and wrote.
    pub bytes: Bytes,
    info: String,
}

impl Redis {
    /// Starts it in `place`.
    pub fn start(place: &Place) -> Result<Self> {
        Self::start_with(place, &[])
    }

    /// Starts it in `place` with more options, such as `--requirepass`.
    pub fn start_with(place: &Place, options: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir().context("create Redis' directory")?;
        let address = SocketAddr::from((place.ipv4, place.port()?));
        let socket = directory.path().join("redis.sock");
        let mut process = Process::start(
            place
                .command(program("redis-server")?)
                .args(["--bind", "*", "--protected-mode", "no", "--port"])
                .arg(address.port().to_string())
                .args(["--save", "", "--appendonly", "no", "--dir"])
                .arg(directory.path())
                .arg("--unixsocket")
                .arg(&socket)
                .args(options),
        )?;
        let socket = Address::Unix(socket);
        accepting(place, &mut process, &address.into())?;
        // It listens there a moment later.
        accepting(place, &mut process, &socket)?;
        Ok(Self { process, address, socket, _directory: directory })
    }

    /// Opens its ledger.
    pub fn ledger(&self) -> Result<Ledger> {
        Ok(Ledger { teller: self.socket.connect()? })
    }
}

impl Ledger {
    const CLEARED: &[u8] = b"+OK\r\n";
    const ASK: &[u8] = b"INFO everything\r\n";

    /// Begins a new page.
    pub fn clear(&self) -> Result<()> {
        self.teller.ask(b"CONFIG RESETSTAT\r\n", Self::CLEARED)
    }

    /// Reads the page, once, which itself counts.
    pub fn read(&self) -> Result<Asked> {
        self.teller.say(Self::ASK)?;
        let mut length = String::new();
        while !length.ends_with("\r\n") {
            length.push(self.teller.hear(1)?[0].into());
        }
        let length: usize = length
            .trim_end()
            .strip_prefix('$')
            .and_then(|digits| digits.parse().ok())
            .with_context(|| format!("parse the length of Redis' answer, {length:?}"))?;
        let mut info = self.teller.hear(length + 2)?;
        info.truncate(length);
        let info = String::from_utf8(info).context("decode Redis' answer")?;
        let up = figure(&info, "total_net_input_bytes:")? - Self::ASK.len() as u64;
        let down = figure(&info, "total_net_output_bytes:")? - Self::CLEARED.len() as u64;
        let connections = figure(&info, "total_connections_received:")?;
        Ok(Asked { connections, bytes: Bytes { up, down }, info })
    }
}

impl Asked {
    /// How often it was asked this command, in small letters.
    pub fn calls(&self, command: &str) -> Result<u64> {
        figure(&self.info, &format!("cmdstat_{command}:calls="))
    }
}

fn figure(info: &str, name: &str) -> Result<u64> {
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.split(',').next()?.parse().ok())
        .with_context(|| format!("find {name} in what Redis says"))
}

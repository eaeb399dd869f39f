//! Redis.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::{accepting, program};
use crate::address::Address;
use crate::place::Place;
use crate::process::Process;

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

impl Redis {
    /// Starts it in `place`.
    pub fn start(place: &Place) -> Result<Self> {
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
                .arg(&socket),
        )?;
        accepting(place, &mut process, &address.into())?;
        Ok(Self { process, address, socket: Address::Unix(socket), _directory: directory })
    }
}

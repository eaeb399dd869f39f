//! MariaDB, where the server speaks first.

use std::net::SocketAddr;

use anyhow::Result;

use super::{Home, START, accepting};
use crate::address::Address;
use crate::place::Place;
use crate::process::{Process, run};

/// A MariaDB server with the user `root` and no password.
#[derive(Debug)]
pub struct Mariadb {
    /// Its process.
    pub process: Process,
    /// Where it listens.
    pub address: SocketAddr,
    /// The Unix socket where it listens too.
    pub socket: Address,
    _directory: tempfile::TempDir,
}

impl Mariadb {
    /// Makes a database and starts it in `place`.
    pub fn start(place: &Place) -> Result<Self> {
        // Everybody may in, from anywhere: it is reached across namespaces, and lives for one test.
        Self::start_with(place, &["--skip-grant-tables", "--skip-networking=0"])
    }

    /// Makes a database and starts it in `place` with more options; without any, only those come in who may.
    pub fn start_with(place: &Place, options: &[&str]) -> Result<Self> {
        let home = Home::of("mysql")?;
        let data = format!("--datadir={}", home.path().join("data").display());
        run(
            home.command(place, "mariadb-install-db")?
                .args(["--no-defaults", &data, "--auth-root-authentication-method=normal"])
                .args(["--skip-test-db", "--skip-name-resolve"]),
            START,
        )?;
        let address = SocketAddr::from((place.ipv4, place.port()?));
        let socket = home.path().join("mariadb.sock");
        let mut process = Process::start(
            home.command(place, "mariadbd")?
                .args(["--no-defaults", &data, "--bind-address=*"])
                .args(options)
                .arg(format!("--port={}", address.port()))
                .arg(format!("--socket={}", socket.display()))
                .args(["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=8M"]),
        )?;
        accepting(place, &mut process, &address.into())?;
        Ok(Self { process, address, socket: Address::Unix(socket), _directory: home.directory })
    }
}

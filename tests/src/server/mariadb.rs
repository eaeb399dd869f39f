//! MariaDB, where the server speaks first.

use std::net::SocketAddr;

use anyhow::Result;

use super::{Home, START, accepting};
use crate::place::Place;
use crate::process::{Process, run};

/// A MariaDB server with the user `root` and no password.
#[derive(Debug)]
pub struct Mariadb {
    _process: Process,
    /// Where it listens.
    pub address: SocketAddr,
    _directory: tempfile::TempDir,
}

impl Mariadb {
    /// Makes a database and starts it in `place`.
    pub fn start(place: &Place) -> Result<Self> {
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
        // Everybody may in, from anywhere: it is reached across namespaces, and lives for one test.
        let mut process = Process::start(
            home.command(place, "mariadbd")?
                .args(["--no-defaults", &data, "--bind-address=*", "--skip-grant-tables"])
                .arg("--skip-networking=0")
                .arg(format!("--port={}", address.port()))
                .arg(format!("--socket={}", socket.display()))
                .args(["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=8M"]),
        )?;
        accepting(place, &mut process, &address.into())?;
        Ok(Self { _process: process, address, _directory: home.directory })
    }
}

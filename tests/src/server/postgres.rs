//! PostgreSQL.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Home, START, accepting};
use crate::address::Address;
use crate::place::Place;
use crate::process::{Process, run};
use crate::wait::until;

/// A PostgreSQL server with a fresh cluster, the superuser `postgres`, and no password.
#[derive(Debug)]
pub struct Postgres {
    process: Process,
    /// Where it listens.
    pub address: SocketAddr,
    /// The Unix socket where it listens too.
    pub socket: Address,
    _directory: tempfile::TempDir,
}

impl Postgres {
    /// Makes a cluster and starts it in `place`.
    pub fn start(place: &Place) -> Result<Self> {
        let home = Home::of("postgres")?;
        let data = home.path().join("data");
        let initdb = ["--no-sync", "--auth=trust", "--username=postgres", "--locale=C.UTF-8"];
        run(home.command(place, "initdb")?.args(initdb).arg("--pgdata").arg(&data), START)?;
        let trust = "local all all trust\nhost all all all trust\n";
        std::fs::write(data.join("pg_hba.conf"), trust).context("write pg_hba.conf")?;

        let address = SocketAddr::from((place.ipv4, place.port()?));
        let mut process = Process::start(
            home.command(place, "postgres")?
                .arg("-D")
                .arg(&data)
                .args(["-p", &address.port().to_string(), "-c", "listen_addresses=*"])
                .arg("-c")
                .arg(format!("unix_socket_directories={}", home.path().display()))
                .args(["-c", "fsync=off", "-c", "max_connections=100"]),
        )?;
        // The socket exists before its server answers; a session proves that it does.
        accepting(place, &mut process, &address.into())?;
        let socket = home.path().join(format!(".s.PGSQL.{}", address.port()));
        until("a session of PostgreSQL", START, || {
            process.still_runs()?;
            let ready = Process::start(
                home.command(place, "pg_isready")?
                    .arg("-h")
                    .arg(home.path())
                    .args(["-p", &address.port().to_string()]),
            )?;
            Ok(ready.finish(START)?.status.success().then_some(()))
        })?;
        Ok(Self { process, address, socket: Address::Unix(socket), _directory: home.directory })
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Killed outright it would leave its shared memory behind, so it gets to quit first.
        // Whatever goes wrong, the process is killed next.
        let _ = self.process.signal(libc::SIGQUIT).and_then(|()| {
            until("the end of PostgreSQL", Duration::from_secs(10), || self.process.ended())
        });
    }
}

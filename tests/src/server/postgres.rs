//! PostgreSQL.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Home, START, accepting};
use crate::address::Address;
use crate::place::Place;
use crate::process::{Process, run};
use crate::wait::until;

/// A PostgreSQL server with a fresh cluster, the superuser `postgres`, and, as [`Kind`] says, a password.
#[derive(Debug)]
pub struct Postgres {
    /// Its first process.
    pub process: Process,
    /// Where it listens.
    pub address: SocketAddr,
    /// The Unix socket where it listens too.
    pub socket: Address,
    directory: tempfile::TempDir,
}

/// The password of `postgres` where one is asked for.
pub const PASSWORD: &str = "a password";

/// What a cluster is like.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// What it asks for on TCP: trust, password, md5 or scram-sha-256.
    pub login: &'static str,
    /// A copy that takes no writes.
    pub standby: bool,
    /// By TLS; needs openssl.
    pub encrypts: bool,
}

impl Postgres {
    /// Makes a cluster and starts it in `place`.
    pub fn start(place: &Place) -> Result<Self> {
        Self::start_with(place, Kind { login: "trust", standby: false, encrypts: false })
    }

    /// Makes a cluster of this kind and starts it in `place`.
    pub fn start_with(place: &Place, kind: Kind) -> Result<Self> {
        let home = Home::of("postgres")?;
        let data = data(&home);
        let secret = home.path().join("password");
        std::fs::write(&secret, PASSWORD).context("write the password")?;
        let initdb = ["--no-sync", "--auth-local=trust", "--username=postgres", "--locale=C.UTF-8"];
        run(
            home.command(place, "initdb")?
                .args(initdb)
                .arg(format!("--auth-host={}", kind.login))
                .arg(format!("--pwfile={}", secret.display()))
                .arg("--pgdata")
                .arg(&data),
            START,
        )?;
        let login = kind.login;
        let hba = format!(
            "local all all trust\nhost all all all {login}\nhost replication all all {login}\n"
        );
        std::fs::write(data.join("pg_hba.conf"), hba).context("write pg_hba.conf")?;
        if kind.standby {
            // A standby without a primary: it is in recovery for good, and may be read.
            std::fs::write(data.join("standby.signal"), "").context("write standby.signal")?;
        }
        let mut encryption = Vec::new();
        if kind.encrypts {
            let (key, certificate) = (home.path().join("key.pem"), home.path().join("crt.pem"));
            run(
                home.command(place, "openssl")?
                    .args(["req", "-new", "-x509", "-nodes", "-subj", "/CN=db", "-newkey", "ec"])
                    .args(["-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout"])
                    .arg(&key)
                    .arg("-out")
                    .arg(&certificate),
                START,
            )?;
            encryption = vec![
                "-c".to_owned(),
                "ssl=on".to_owned(),
                "-c".to_owned(),
                format!("ssl_key_file={}", key.display()),
                "-c".to_owned(),
                format!("ssl_cert_file={}", certificate.display()),
            ];
        }
        Self::serve(place, home, &encryption)
    }

    /// Makes a copy of another cluster, which asks for no password, and has it follow that from `place`.
    pub fn following(place: &Place, primary: &Self) -> Result<Self> {
        let home = Home::of("postgres")?;
        let (host, port) = (primary.address.ip().to_string(), primary.address.port().to_string());
        run(
            home.command(place, "pg_basebackup")?
                .args(["-h", &host, "-p", &port, "-U", "postgres", "--no-sync"])
                .args(["--checkpoint=fast", "--write-recovery-conf", "--pgdata"])
                .arg(data(&home)),
            START,
        )?;
        Self::serve(place, home, &[])
    }

    fn serve(place: &Place, home: Home, options: &[String]) -> Result<Self> {
        let address = SocketAddr::from((place.ipv4, place.port()?));
        let mut process = Process::start(
            home.command(place, "postgres")?
                .arg("-D")
                .arg(data(&home))
                .args(["-p", &address.port().to_string(), "-c", "listen_addresses=*"])
                .arg("-c")
                .arg(format!("unix_socket_directories={}", home.path().display()))
                .args(["-c", "fsync=off", "-c", "max_connections=100"])
                // In its directory, which goes with it however it ends.
                .args(["-c", "dynamic_shared_memory_type=mmap"])
                .args(options),
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
        Ok(Self { process, address, socket: Address::Unix(socket), directory: home.directory })
    }
}

impl Postgres {
    /// Removes the segment by which it is told to be running, if it has been killed; else that is gone, and
    /// so is the file whose seventh line ends in its number.
    fn remove_shared_memory(&self) -> Result<()> {
        let file = self.directory.path().join("data/postmaster.pid");
        let told = std::fs::read_to_string(file).context("read postmaster.pid")?;
        let line = told.lines().nth(6).context("find the segment")?;
        let segment = line.split_whitespace().last().context("find the segment")?;
        let segment = segment.parse().context("parse the segment")?;
        // SAFETY: takes no memory of ours.
        unsafe { libc::shmctl(segment, libc::IPC_RMID, std::ptr::null_mut()) };
        Ok(())
    }
}

fn data(home: &Home) -> PathBuf {
    home.path().join("data")
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Killed outright it would leave its shared memory behind, so it gets to quit first, and what is stopped
        // could not. Whatever goes wrong, the process is killed next.
        let _ = self.process.signal_family(libc::SIGCONT);
        let _ = self.process.signal(libc::SIGQUIT).and_then(|()| {
            until("the end of PostgreSQL", Duration::from_secs(10), || self.process.ended())
        });
        let _ = self.remove_shared_memory();
    }
}

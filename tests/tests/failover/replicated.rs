//! Servers with a replica that can take over.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use ambassador_tests::place::Place;
use ambassador_tests::process::{Process, run};
use ambassador_tests::server::postgres::Postgres;
use ambassador_tests::server::redis::Redis;
use ambassador_tests::wait::{SOON, until_true};
use anyhow::{Result, ensure};

/// A server that can be followed by a replica, and be written to by `client_pool.py`.
pub(crate) trait Replicated: Sized {
    /// As `client_pool.py` calls it.
    const NAME: &'static str;
    /// What is up by this check takes writes.
    const CHECK: &'static str;

    fn primary() -> Result<Self>;
    fn following(primary: &Self) -> Result<Self>;
    fn address(&self) -> SocketAddr;
    fn process(&self) -> &Process;
    fn promote(&self) -> Result<()>;
    /// The names of what was written.
    fn written(&self) -> Result<BTreeSet<String>>;
}

impl Replicated for Redis {
    const NAME: &'static str = "redis";
    const CHECK: &'static str = "{ redis: { role: primary } }";

    fn primary() -> Result<Self> {
        Self::start(&Place::here())
    }

    fn following(primary: &Self) -> Result<Self> {
        let port = primary.address.port().to_string();
        let replica = Self::start_with(
            &Place::here(),
            &["--replicaof", &primary.address.ip().to_string(), &port],
        )?;
        until_true("the replica's link", || {
            Ok(redis_cli(&replica, &["info", "replication"])?.contains("master_link_status:up"))
        })?;
        Ok(replica)
    }

    fn address(&self) -> SocketAddr {
        self.address
    }

    fn process(&self) -> &Process {
        &self.process
    }

    fn promote(&self) -> Result<()> {
        let told = redis_cli(self, &["replicaof", "no", "one"])?;
        ensure!(told.trim() == "OK", "it is not promoted: {told}");
        Ok(())
    }

    fn written(&self) -> Result<BTreeSet<String>> {
        Ok(redis_cli(self, &["smembers", "written"])?.lines().map(str::to_owned).collect())
    }
}

impl Replicated for Postgres {
    const NAME: &'static str = "postgres";
    const CHECK: &'static str = "{ postgres: { user: postgres, role: primary } }";

    fn primary() -> Result<Self> {
        let primary = Self::start(&Place::here())?;
        psql(&primary, "create table written (name text primary key)")?;
        Ok(primary)
    }

    fn following(primary: &Self) -> Result<Self> {
        Self::following(&Place::here(), primary)
    }

    fn address(&self) -> SocketAddr {
        self.address
    }

    fn process(&self) -> &Process {
        &self.process
    }

    fn promote(&self) -> Result<()> {
        let told = psql(self, "select pg_promote()")?;
        ensure!(told.trim() == "t", "it is not promoted: {told}");
        Ok(())
    }

    fn written(&self) -> Result<BTreeSet<String>> {
        Ok(psql(self, "select name from written")?.lines().map(str::to_owned).collect())
    }
}

fn redis_cli(server: &Redis, words: &[&str]) -> Result<String> {
    let mut client = Place::here().command("redis-cli");
    run(client.args(["-p", &server.address.port().to_string()]).args(words), SOON)
}

fn psql(server: &Postgres, query: &str) -> Result<String> {
    let mut client = Place::here().command("psql");
    client.args(["-h", &server.address.ip().to_string(), "-U", "postgres", "-tA"]);
    run(client.args(["-p", &server.address.port().to_string(), "-c", query]), SOON)
}

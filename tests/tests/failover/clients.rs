//! The pools that apps have, redis-py's and psycopg's, while the primary fails under them and its replica is promoted.
//! In between nobody takes writes, and whoever connects is held. What the new primary has acknowledged is there.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Instant;

use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::server::postgres::Postgres;
use ambassador_tests::server::redis::Redis;
use ambassador_tests::wait::until_true;
use ambassador_tests::way::Way;
use ambassador_tests::{installed, skip};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::before;
use crate::client_pool::{ClientPool, PYTHON, Told};
use crate::replicated::Replicated;

/// Connections of a pool.
const MEMBERS: usize = 8;
/// So many writes of each member show who serves it.
const WRITES: usize = 50;

/// Ends a test that needs a module that is not installed.
macro_rules! importable {
    ($module:literal) => {
        let mut python = Command::new(PYTHON);
        let imported = python.args(["-c", concat!("import ", $module)]).output();
        if !imported.is_ok_and(|it| it.status.success()) {
            skip!("{} of Python is not installed", $module);
        }
    };
}

/// As with any pool, a connection that is made while the dead process is taken apart is accepted, and reset: that is the
/// second failure.
#[test]
fn redis_py_goes_on_with_the_replica_of_a_killed_primary() -> Result<()> {
    installed!("redis-server", "redis-cli");
    importable!("redis");
    fails_over::<Redis>(libc::SIGKILL, 2)
}

#[test]
fn redis_py_goes_on_with_the_replica_of_a_primary_that_hangs() -> Result<()> {
    installed!("redis-server", "redis-cli");
    importable!("redis");
    fails_over::<Redis>(libc::SIGSTOP, 1)
}

#[test]
fn psycopg_goes_on_with_the_standby_of_a_killed_primary() -> Result<()> {
    installed!("initdb", "postgres", "pg_isready", "pg_basebackup", "psql");
    importable!("psycopg_pool");
    fails_over::<Postgres>(libc::SIGKILL, 2)
}

#[test]
fn psycopg_goes_on_with_the_standby_of_a_primary_that_hangs() -> Result<()> {
    installed!("initdb", "postgres", "pg_isready", "pg_basebackup", "psql");
    importable!("psycopg_pool");
    fails_over::<Postgres>(libc::SIGSTOP, 1)
}

/// By each tier but `copy`, which connects as `splice` does.
fn fails_over<R: Replicated>(signal: libc::c_int, at_most: usize) -> Result<()> {
    for way in Way::proxied()?.into_iter().filter(|way| *way != Way::Copy) {
        fails_over_by::<R>(way, signal, at_most).with_context(|| format!("{way}"))?;
    }
    Ok(())
}

fn fails_over_by<R: Replicated>(way: Way, signal: libc::c_int, at_most: usize) -> Result<()> {
    let primary = R::primary()?;
    let replica = R::following(&primary)?;
    let [old, new] = [primary.address(), replica.address()];
    let more = format!(
        "connect: {{ hold: 1m }}
    health: {{ check: {}, interval: 300ms, timeout: 1s, fall: 2, rise: 2 }}",
        R::CHECK
    );
    let (ambassador, route) = before(way, [old, new], &more)?;
    until_take_writes(&ambassador, [true, false])?;
    let mut pool = ClientPool::start(R::NAME, route, MEMBERS)?;
    pool.until_written_to(old.port(), WRITES)?;
    until_lead(&ambassador, old, Some(way))?;

    let failed = Instant::now();
    primary.process().signal_family(signal)?;
    until_take_writes(&ambassador, [false, false])?;
    let noticed = failed.elapsed();
    replica.promote()?;
    let promoted = failed.elapsed();
    let served = pool.until_written_to(new.port(), 1);
    served.with_context(|| format!("its log was: {}", ambassador.process.stderr()))?;
    let served = failed.elapsed();
    pool.until_written_to(new.port(), WRITES)?;
    // What was held is relayed, on `direct` too.
    until_lead(&ambassador, new, None)?;

    let Told { writes, unconnected } = pool.end()?;
    let mut failures: Vec<_> = writes.iter().filter_map(|it| it.outcome.as_ref().err()).collect();
    println!(
        "{} by {way}: of {} writes {} failed, {} connections could not be made; all were served {served:?} after the \
         failure, which was noticed after {noticed:?}; the replica was promoted after {promoted:?}",
        R::NAME,
        writes.len(),
        failures.len(),
        unconnected.len()
    );
    let refused = unconnected.iter().any(|why| why.contains("refused") || why.contains("time"));
    ensure!(!refused, "nobody was there, or answered: {unconnected:?}");
    failures.extend(&unconnected);
    let bound = MEMBERS * at_most;
    ensure!(failures.len() <= bound, "more than {bound}: {failures:?}");
    let there = replica.written()?;
    let acknowledged = writes.iter().filter(|it| it.outcome == Ok(new.port()));
    let lost: Vec<_> = acknowledged.filter(|it| !there.contains(&it.name)).collect();
    ensure!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    Ok(())
}

/// Waits until these are, or are not, what takes writes, as far as the ambassador knows.
fn until_take_writes(ambassador: &Ambassador, take: [bool; 2]) -> Result<()> {
    until_true(&format!("{take:?} to be known"), || {
        let status = ambassador.status()?;
        let endpoints = &status["routes"][0]["endpoints"];
        Ok((0..2).all(|at| endpoints[at]["healthy"] == take[at]))
    })
}

/// Waits until all connections, of which there are some, lead to this server, by this way or by any.
fn until_lead(ambassador: &Ambassador, server: SocketAddr, way: Option<Way>) -> Result<()> {
    let lead = |it: &Value| {
        it["endpoint"] == server.to_string() && way.is_none_or(|way| it["tier"] == way.to_string())
    };
    until_true(&format!("connections to {server} alone"), || {
        let connections = ambassador.connections()?;
        Ok(!connections.is_empty() && connections.iter().all(lead))
    })
    .with_context(|| format!("{:?}", ambassador.connections()))
}

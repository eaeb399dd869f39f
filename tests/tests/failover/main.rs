//! A primary that fails under an app's pool of connections: the pool is soon served by the other server, on every
//! way; what fails is what was on a connection to the primary, and no answer is wrong. How long it takes is for
//! `cargo xtask bench`.

mod client_pool;
mod clients;
mod replicated;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::installed;
use ambassador_tests::place::Place;
use ambassador_tests::pool::{Call, Dialect, End, Pool};
use ambassador_tests::server::redis::Redis;
use ambassador_tests::way::Way;
use anyhow::{Context, Result, ensure};

const MEMBERS: usize = 16;
/// Longer than any call may take here: what fails has been told so.
const PATIENCE: Duration = Duration::from_secs(10);
const CHECKED: &str = "health: { check: redis, interval: 200ms, timeout: 200ms, fall: 2, rise: 2 }";

/// The kernel ends the connections of a dead process before it closes what that listened on: one that is made in
/// between is accepted, and reset (fs/file_table.c and kernel/task_work.c: what is put off first is done last).
#[test]
fn a_killed_primary_costs_each_connection_two_calls_at_most() -> Result<()> {
    fails_over(libc::SIGKILL, 2)
}

#[test]
fn a_primary_that_hangs_costs_each_connection_one_call() -> Result<()> {
    fails_over(libc::SIGSTOP, 1)
}

fn fails_over(signal: libc::c_int, at_most: usize) -> Result<()> {
    installed!("redis-server");
    for way in Way::proxied()? {
        fails_over_by(way, signal, at_most).with_context(|| format!("{way}"))?;
    }
    Ok(())
}

fn fails_over_by(way: Way, signal: libc::c_int, at_most: usize) -> Result<()> {
    let here = Place::here();
    let [primary, standby] = [Redis::start(&here)?, Redis::start(&here)?];
    let (ambassador, route) = before(way, [primary.address, standby.address], CHECKED)?;
    let mut pool = Pool::start(route, Dialect::Redis, MEMBERS, PATIENCE);
    pool.until_served_by(primary.address.port())?;
    primary.process.signal(signal)?;
    let served = pool.until_served_by(standby.address.port());
    served.with_context(|| format!("its log was: {}", ambassador.process.stderr()))?;
    let calls = pool.end()?;
    let refused = calls.iter().filter(|call| call.end == End::NotConnected).count();
    ensure!(refused == 0, "{refused} calls found nobody to connect to");
    for member in 0..MEMBERS {
        let of_it = |call: &&Call| call.member == member && call.end == End::Failed;
        let failed = calls.iter().filter(of_it).count();
        ensure!((1..=at_most).contains(&failed), "{failed} calls of one connection failed");
    }
    Ok(())
}

/// An ambassador in front of these, the first of which is preferred, that knows more of its upstream.
fn before(way: Way, servers: [SocketAddr; 2], more: &str) -> Result<(Ambassador, SocketAddr)> {
    let here = Place::here();
    let route = SocketAddr::from((Ipv4Addr::LOCALHOST, here.port()?));
    let config = format!(
        "version: 1
routes: [{{ listen: '{route}', upstream: db }}]
upstreams:
  db:
    endpoints: ['{}', '{}']
    balance: failover
    on_unhealthy: close
    {more}
",
        servers[0], servers[1]
    );
    Ok((way.launch(&here)?.config(&config)?.start()?, route))
}

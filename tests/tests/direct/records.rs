//! What is told of a connection that the ambassador never touches: exact bytes, however it ends, once.

use ambassador::sockets::each_connection;
use anyhow::{Context, Result, ensure};
use serde_json::Value;

use ambassador_tests::address::Family;
use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::needs;
use ambassador_tests::peer::{Listener, Peer};
use ambassador_tests::place::Place;
use ambassador_tests::wait::{SOON, until, until_true};

use crate::{ROUTE, loopback, start, the_connection};

/// Of include/net/tcp_states.h.
const FIN_WAIT2: u8 = 5;

const UP: usize = 12_345;
const DOWN: usize = 54_321;

/// How two peers that have carried [`UP`] and [`DOWN`] bytes part, and what is told of it.
type Parting = (&'static str, fn(Peer, Peer) -> Result<()>, &'static str);

const PARTINGS: [Parting; 10] = [
    ("client first", |client, server| close(client, server), "ok"),
    ("server first", |client, server| close(server, client), "ok"),
    ("client half, then server", |client, server| half_close(client, server), "ok"),
    ("server half, then client", |client, server| half_close(server, client), "ok"),
    ("both at once", both_at_once, "ok"),
    ("reset by client", |client, server| reset(client, server), "client_reset"),
    ("reset by server", |client, server| reset(server, client), "upstream_reset"),
    ("client half, reset by server", |client, server| half_reset(client, server), "upstream_reset"),
    ("client half and heard, reset by server", heard_half_reset, "upstream_reset"),
    ("server half, reset by client", |client, server| half_reset(server, client), "client_reset"),
];

#[test]
fn the_bytes_of_a_connection_are_exact_however_it_ends() -> Result<()> {
    needs!(Direct);
    for family in [Family::Tcp, Family::Tcp6] {
        if ambassador_tests::way::Way::Direct.obstacle(family)?.is_some() {
            continue;
        }
        let Scene { ambassador, server, route } = Scene::new(family)?;
        for (number, (how, part, outcome)) in PARTINGS.into_iter().enumerate() {
            let (client, server) = carried(&route, &server)?;
            let peer = client.socket().local_addr()?.as_socket().context("find an address")?;
            part(client, server).context(how)?;
            let record = record(&ambassador, &peer.to_string()).context(how)?;
            let told = (&record["bytes_up"], &record["bytes_down"], &record["outcome"]);
            ensure!(told == (&UP.into(), &DOWN.into(), &outcome.into()), "{how}: {record}");
            ensure!(record["rtt_us"].as_u64().is_some_and(|rtt| rtt < 1_000_000), "{record}");
            let sums = totals(&ambassador)?;
            let number = number + 1;
            ensure!(sums == ((UP * number) as f64, (DOWN * number) as f64), "{how}: {sums:?}");
        }
        let metrics = ambassador.metrics()?;
        let total = |outcome| {
            metrics.sum(
                "ambassador_connections_total",
                &[("route", ROUTE), ("tier", "direct"), ("outcome", outcome)],
            )
        };
        ensure!(total("ok") == Some(5.0));
        ensure!((total("client_reset"), total("upstream_reset")) == (Some(2.0), Some(3.0)));
        let active = [("route", ROUTE), ("tier", "direct")];
        ensure!(metrics.sum("ambassador_connections_active", &active) == Some(0.0));
    }
    Ok(())
}

#[test]
fn a_connection_that_moved_nothing_is_told_with_nothing() -> Result<()> {
    needs!(Direct);
    let Scene { ambassador, server, route } = Scene::new(Family::Tcp)?;
    let (client, server) = (route.connect()?, server.accept()?);
    let peer = client.socket().local_addr()?.as_socket().context("find an address")?;
    close(client, server)?;
    let record = record(&ambassador, &peer.to_string())?;
    ensure!((&record["bytes_up"], &record["bytes_down"]) == (&0.into(), &0.into()), "{record}");
    Ok(())
}

/// What arrived is counted, though the app never took it.
#[test]
fn an_app_that_goes_without_having_read_all_is_told_as_its_reset() -> Result<()> {
    needs!(Direct);
    let Scene { ambassador, server, route } = Scene::new(Family::Tcp)?;
    let (client, server) = carried(&route, &server)?;
    let peer = client.socket().local_addr()?.as_socket().context("find an address")?;
    server.say(b"unread")?;
    let arrived = || Ok(rustix::io::ioctl_fionread(client.socket())? == 6);
    until_true("the bytes to arrive", arrived)?;
    drop(client);
    server.hear_reset()?;
    let record = record(&ambassador, &peer.to_string())?;
    let told = (&record["bytes_up"], &record["bytes_down"], &record["outcome"]);
    ensure!(told == (&UP.into(), &(DOWN + 6).into(), &"client_reset".into()), "{record}");
    Ok(())
}

#[test]
fn a_connection_that_never_was_is_told_as_failed() -> Result<()> {
    needs!(Direct);
    let here = Place::here();
    let (route, dead) = (loopback(&here)?, loopback(&here)?);
    let ambassador = start(&here, &route, &dead)?;
    for _ in 0..3 {
        ensure!(route.connect().is_err(), "a connection to nobody");
    }
    let records = until("three records", SOON, || {
        let told = ambassador.access_records("outcome", "connect_failed")?;
        Ok((told.len() == 3).then_some(told))
    })?;
    for record in records {
        ensure!(record["endpoint"] == dead.to_string(), "{record}");
        ensure!((&record["bytes_up"], &record["bytes_down"]) == (&0.into(), &0.into()), "{record}");
    }
    let log = ambassador.log()?;
    let warnings: Vec<_> = log.iter().filter(|line| line["level"] == "WARN").collect();
    ensure!(warnings.len() == 1 && warnings[0].to_string().contains("could not reach"), "{log:?}");
    let metrics = ambassador.metrics()?;
    let failed = [("route", ROUTE), ("tier", "direct"), ("outcome", "connect_failed")];
    ensure!(metrics.sum("ambassador_connections_total", &failed) == Some(3.0));
    Ok(())
}

#[test]
fn the_bytes_of_an_open_connection_are_told_and_not_counted_again() -> Result<()> {
    needs!(Direct);
    let Scene { ambassador, server, route } = Scene::new(Family::Tcp)?;
    let (client, server) = carried(&route, &server)?;
    let sent = (UP as f64, DOWN as f64);
    until_true("the bytes so far in the metrics", || Ok(totals(&ambassador)? == sent))?;
    let told = the_connection(&ambassador)?;
    ensure!((&told["bytes_up"], &told["bytes_down"]) == (&UP.into(), &DOWN.into()), "{told}");
    ensure!(told["route"] == ROUTE && told["tier"] == "direct", "{told}");
    let status = ambassador.command(&["status", "--json"])?.success()?;
    let status: Value = serde_json::from_str(&status).context("parse the status")?;
    let route = &status["routes"][0];
    ensure!(route["connections"] == 1 && route["tier"] == "direct", "{status}");
    ensure!((&route["bytes_up"], &route["bytes_down"]) == (&UP.into(), &DOWN.into()), "{status}");
    ensure!(route["endpoints"][0]["connections"] == 1, "{status}");

    // A half-close sends no byte, though it takes a sequence number, once that is acknowledged.
    client.finish()?;
    until_heard(&client)?;
    ensure!(totals(&ambassador)? == sent, "{:?}", totals(&ambassador)?);
    server.finish()?;
    client.hear_end()?;
    ensure!(totals(&ambassador)? == sent, "{:?}", totals(&ambassador)?);
    drop((client, server));
    until_true("the record", || Ok(ambassador.access_records("tier", "direct")?.len() == 1))?;
    ensure!(totals(&ambassador)? == sent, "{:?} after {sent:?}", totals(&ambassador)?);
    Ok(())
}

/// An ambassador with one direct route to a server.
struct Scene {
    ambassador: Ambassador,
    server: Listener,
    route: ambassador_tests::address::Address,
}

impl Scene {
    fn new(family: Family) -> Result<Self> {
        let (here, server) = (Place::here(), Listener::new(family)?);
        let ip = server.address().tcp()?.ip();
        let route = std::net::SocketAddr::new(ip, here.port()?).into();
        Ok(Self { ambassador: start(&here, &route, server.address())?, server, route })
    }
}

/// Both ends of a connection that has carried [`UP`] and [`DOWN`] bytes, all of them acknowledged.
fn carried(route: &ambassador_tests::address::Address, server: &Listener) -> Result<(Peer, Peer)> {
    let (client, server) = (route.connect()?, server.accept()?);
    client.say(&[1; UP])?;
    server.hear(UP)?;
    server.say(&[2; DOWN])?;
    client.hear(DOWN)?;
    Ok((client, server))
}

fn close(first: Peer, second: Peer) -> Result<()> {
    drop(first);
    second.hear_end()
}

fn half_close(first: Peer, second: Peer) -> Result<()> {
    first.finish()?;
    second.hear_end()?;
    second.finish()?;
    first.hear_end()
}

fn both_at_once(client: Peer, server: Peer) -> Result<()> {
    client.finish()?;
    server.finish()?;
    client.hear_end()?;
    server.hear_end()
}

fn reset(first: Peer, second: Peer) -> Result<()> {
    first.reset()?;
    second.hear_reset()
}

fn half_reset(first: Peer, second: Peer) -> Result<()> {
    first.finish()?;
    second.hear_end()?;
    second.reset()?;
    first.notice_failure().map(drop)
}

fn heard_half_reset(client: Peer, server: Peer) -> Result<()> {
    client.finish()?;
    until_heard(&client)?;
    server.reset()?;
    client.notice_failure().map(drop)
}

/// Waits until the end that a client has sent is acknowledged.
fn until_heard(client: &Peer) -> Result<()> {
    until_true("the acknowledgement of the client's end", || {
        let (cookie, mut acknowledged) = (client.socket().cookie()?, false);
        each_connection(|it| acknowledged |= it.cookie == cookie && it.state == FIN_WAIT2)?;
        Ok(acknowledged)
    })
}

/// The access record of a connection from this address.
fn record(ambassador: &Ambassador, peer: &str) -> Result<Value> {
    until("the access record", SOON, || {
        let mut told = ambassador.access_records("peer", peer)?;
        ensure!(told.len() <= 1, "told more than once: {told:?}");
        Ok(told.pop())
    })
}

/// Bytes up and down of the tier, as the metrics say.
fn totals(ambassador: &Ambassador) -> Result<(f64, f64)> {
    let metrics = ambassador.metrics()?;
    let sum = |direction| {
        let labels = [("route", ROUTE), ("tier", "direct"), ("direction", direction)];
        metrics.sum("ambassador_bytes_total", &labels).unwrap_or_default()
    };
    Ok((sum("up"), sum("down")))
}

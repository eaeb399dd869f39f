//! Limits of a route, whichever tier carries it: what is too much is refused at once, counted, and told once. What
//! counts on `direct` is in the tests of that.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::place::Place;
use ambassador_tests::pod;
use ambassador_tests::wait::until_true;
use ambassador_tests::way::Way;
use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::silent::ways;
use crate::{hold, listen, tally};

/// Connections that are too many.
const BURST: usize = 20;
/// So long they may take, all of them: less than one that waits for something.
const AT_ONCE: Duration = Duration::from_secs(5);

#[test]
fn an_endpoint_gets_no_more_connections_than_it_may_have() -> Result<()> {
    for way in ways()? {
        let here = Place::here();
        let (one, two) = (Echo::greeting("1")?, Echo::greeting("2")?);
        let endpoints = format!("endpoints: ['{}', '{}']", one.address(), two.address());
        let upstream = format!("{endpoints}, balance: round_robin");
        let limits = "per_endpoint: { max_connections: 3 }";
        let (ambassador, route) = limited(way, &here, limits, &upstream)?;
        let mut held = hold(&route, 6)?;
        ensure!(tally(&held) == [("1", 3), ("2", 3)].into(), "{way}: {:?}", tally(&held));
        burst_is_refused(&ambassador, &here, &route, "as per_endpoint allows")
            .with_context(|| format!("{way}"))?;
        ensure!((one.accepted(), two.accepted()) == (3, 3), "{way}: one more got through");
        held.retain(|(name, _)| name == "2");
        until_true(
            "room for another",
            || Ok(greeted(&route, 1).is_ok_and(|(name, _)| name == "1")),
        )
        .with_context(|| format!("{way}"))?;
    }
    Ok(())
}

#[test]
fn no_more_connections_are_on_their_way_than_may_be() -> Result<()> {
    for (limits, why) in [
        ("max_pending: 2", "2 connections are on their way"),
        ("per_endpoint: { max_pending: 2 }", "as per_endpoint allows"),
    ] {
        for way in ways()? {
            let pod = pod!("nft");
            let echo = Echo::on(listen(&pod, pod.upstream.ipv4.into())?, "e");
            pod.upstream.blackhole(&format!("tcp dport {}", echo.address().port()?))?;
            let upstream = format!("endpoints: ['{}'], connect: {{ timeout: 1m }}", echo.address());
            let (ambassador, route) = limited(way, &pod.inside, limits, &upstream)?;
            let connect = || pod.inside.enter(|| route.connect_without_blocking());
            let waiting = [connect()?, connect()?];
            // One that is past us is not listed before it has arrived, but counts when connect(2) returns.
            let listed = if way == Way::Direct { 0 } else { waiting.len() };
            until_true("them to be on their way", || Ok(ambassador.connections()?.len() == listed))
                .with_context(|| format!("{way}, {limits}"))?;
            burst_is_refused(&ambassador, &pod.inside, &route, why)
                .with_context(|| format!("{way}, {limits}"))?;
            ensure!(echo.accepted() == 0, "{way}, {limits}: somebody has arrived");
            pod.upstream.filter("flush ruleset")?;
            for client in &waiting {
                let heard = client.hear(1).with_context(|| format!("{way}, {limits}"))?;
                ensure!(heard == b"e", "{way}, {limits}");
            }
            let more = pod.inside.enter(|| hold(&route, 3));
            ensure!(more.with_context(|| format!("{way}, {limits}"))?.len() == 3);
        }
    }
    Ok(())
}

/// An ambassador in a place with one route of which this is said, and its upstream.
fn limited(way: Way, place: &Place, limits: &str, upstream: &str) -> Result<(Ambassador, Address)> {
    let route = Address::from(SocketAddr::from((Ipv4Addr::LOCALHOST, place.port()?)));
    let config = format!(
        "version: 1
routes: [{{ name: limited, listen: '{route}', upstream: up, {limits} }}]
upstreams: {{ up: {{ {upstream} }} }}
"
    );
    Ok((way.launch(place)?.config(&config)?.start()?, route))
}

/// Expects that many are refused, each at once and without a byte; that all are counted, and that the log says why,
/// at most once a second.
fn burst_is_refused(
    ambassador: &Ambassador,
    place: &Place,
    route: &Address,
    why: &str,
) -> Result<()> {
    let begun = Instant::now();
    // On sockmap a reset does not always wake who waits inside a read.
    let refused = || route.connect_without_blocking()?.hear_close();
    place.enter(|| (0..BURST).try_for_each(|_| refused()))?;
    let took = begun.elapsed();
    ensure!(took < AT_ONCE, "{BURST} refusals took {took:?}");
    let counted = || -> Result<f64> {
        let labels = [("route", "limited"), ("outcome", "refused")];
        Ok(ambassador.metrics()?.sum("ambassador_connections_total", &labels).unwrap_or(0.0))
    };
    until_true("refusals in the metrics", || Ok(counted()? >= BURST as f64))?;
    ensure!(counted()? == BURST as f64, "{} of {BURST} are counted", counted()?);
    // What is logged is written a little later, and in order.
    let told = || -> Result<usize> {
        let log = ambassador.log()?;
        let of_it = |line: &&Value| line["level"] == "WARN" && line.to_string().contains(why);
        Ok(log.iter().filter(of_it).count())
    };
    until_true("a warning", || Ok(told()? > 0))?;
    let most = 1 + took.as_secs();
    ensure!(told()? as u64 <= most, "in {took:?} it said {} times why", told()?);
    Ok(())
}

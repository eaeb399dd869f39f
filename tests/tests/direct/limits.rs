//! Limits hold whichever way connections take.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};

use ambassador_tests::address::Address;
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::place::Place;
use ambassador_tests::wait::until_true;
use ambassador_tests::{needs, pod};

use crate::{ROUTE, all_are_direct, connect_bound, hold, start_with};

#[test]
fn connections_of_both_ways_count_and_one_too_many_is_refused() -> Result<()> {
    needs!(Direct);
    let echo = Echo::greeting("e")?;
    let upstream = format!("endpoints: ['{}']", echo.address());
    let (ambassador, route) = start_with(&Place::here(), "max_connections: 4", &upstream)?;
    let relayed = [connect_bound(&route)?, connect_bound(&route)?];
    relayed.iter().try_for_each(|client| client.hear(1).map(drop))?;
    let direct = hold(&route, 2)?;
    all_are_direct(&ambassador, &direct)?;

    route.connect()?.hear_close()?;
    connect_bound(&route)?.hear_close()?;
    ensure!(echo.accepted() == 4, "{} of 4 connections were let through", echo.accepted());
    until_true("two refusals in the metrics", || {
        let refused = [("route", ROUTE), ("outcome", "refused")];
        Ok(ambassador.metrics()?.sum("ambassador_connections_total", &refused) == Some(2.0))
    })?;

    drop(direct);
    until_true("room for another", || Ok(greeted(&route, 1).is_ok()))?;
    Ok(())
}

#[test]
fn a_place_is_free_again_however_a_connection_ends() -> Result<()> {
    needs!(Direct);
    let echo = Echo::greeting("e")?;
    let upstream = format!("endpoints: ['{}']", echo.address());
    let (_ambassador, route) = start_with(&Place::here(), "max_connections: 1", &upstream)?;
    for round in 0..30 {
        until_true("room for another", || {
            let Ok((_, client)) = greeted(&route, 1) else { return Ok(false) };
            match round % 3 {
                0 => client.reset()?,
                1 => client.finish().and_then(|()| client.hear_end())?,
                _ => {}
            }
            Ok(true)
        })?;
    }
    Ok(())
}

#[test]
fn what_one_endpoint_gets_is_limited_over_both_ways() -> Result<()> {
    needs!(Direct);
    let (one, two) = (Echo::greeting("1")?, Echo::greeting("2")?);
    let endpoints = format!("endpoints: ['{}', '{}']", one.address(), two.address());
    let limits = "per_endpoint: { max_connections: 3 }";
    let spread = format!("{endpoints}, balance: round_robin");
    let (ambassador, route) = start_with(&Place::here(), limits, &spread)?;
    let relayed = connect_bound(&route)?;
    relayed.hear(1)?;
    let direct = hold(&route, 5)?;
    all_are_direct(&ambassador, &direct)?;
    route.connect()?.hear_close()?;
    connect_bound(&route)?.hear_close()?;
    ensure!((one.accepted(), two.accepted()) == (3, 3));
    drop(relayed);
    until_true("room for another", || Ok(greeted(&route, 1).is_ok()))?;

    // Where the order decides, the next one is not for those that are too many.
    let (_ambassador, route) = start_with(&Place::here(), limits, &endpoints)?;
    let held = hold(&route, 3)?;
    route.connect()?.hear_close()?;
    ensure!(held.iter().all(|(name, _)| name == "1"));
    Ok(())
}

#[test]
fn connections_on_their_way_are_limited_over_both_ways() -> Result<()> {
    needs!(Direct);
    let pod = pod!("nft");
    let silent = Address::from(SocketAddr::from((pod.upstream.ipv4, pod.upstream.port()?)));
    pod.upstream.blackhole(&format!("tcp dport {}", silent.port()?))?;
    for limits in ["max_pending: 2", "per_endpoint: { max_pending: 2 }"] {
        let upstream = format!("endpoints: ['{silent}'], connect: {{ timeout: 1m }}");
        let (ambassador, route) = start_with(&pod.inside, limits, &upstream)?;
        pod.inside.enter(|| {
            let direct = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            direct.set_nonblocking(true)?;
            ensure!(direct.connect(&route.tcp()?.into()).is_err(), "it cannot be there yet");
            let relayed = connect_bound(&route)?;
            until_true("a relayed connection on its way", || {
                let all = ambassador.command(&["connections", "--json"])?.success()?;
                Ok(all.contains("\"endpoint\":\"\""))
            })?;
            route.connect()?.hear_close().with_context(|| format!("{limits}, past the hook"))?;
            connect_bound(&route)?.hear_close().with_context(|| limits.to_owned())?;
            drop(direct);
            drop(relayed);
            Ok(())
        })?;
    }
    Ok(())
}

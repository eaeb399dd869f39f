//! A configuration that is changed under a running ambassador: what follows it, what does not notice, and what
//! becomes of one that is bad.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::peer::Peer;
use ambassador_tests::place::Place;
use ambassador_tests::wait::{SOON, until, until_true};
use ambassador_tests::way::Way;

mod kernel;
mod refused;
mod shortcuts;
mod storm;
mod triggers;

/// A route of these tests: its name, where it listens, where it leads, and what else is said of it.
struct Route<'a> {
    name: &'a str,
    listen: &'a Address,
    to: &'a Address,
    more: &'a str,
}

fn route<'a>(name: &'a str, listen: &'a Address, to: &'a Address) -> Route<'a> {
    Route { name, listen, to, more: "" }
}

fn config(routes: &[Route]) -> String {
    let mut text = "version: 1\nroutes:\n".to_owned();
    for Route { name, listen, more, .. } in routes {
        text += &format!("  - {{ name: {name}, listen: '{listen}', upstream: {name}, {more} }}\n");
    }
    text += "upstreams:\n";
    for Route { name, to, .. } in routes {
        text += &format!("  {name}: {{ endpoints: ['{to}'] }}\n");
    }
    text
}

/// In each round the busy route moves, and another one comes and goes, each time by a new name.
fn moving(round: usize, servers: &[Echo; 2], [busy, changing]: [&Address; 2]) -> String {
    let (server, name) = (servers[round % 2].address(), format!("other-{round}"));
    config(&[route("busy", busy, server), route(&name, changing, server)])
}

fn loopback(place: &Place) -> Result<Address> {
    Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, place.port()?)).into())
}

/// Connects, and expects this server's greeting of one byte.
fn reaches(route: &Address, greeting: &str) -> Result<Peer> {
    let (greeted, client) = greeted(route, 1)?;
    ensure!(greeted == greeting, "{route} leads to {greeted} and not to {greeting}");
    Ok(client)
}

fn refuses(route: &Address) -> Result<()> {
    ensure!(route.connect().is_err(), "{route} still accepts");
    Ok(())
}

fn succeeds(ambassador: &Ambassador, routes: &[Route]) -> Result<()> {
    ambassador.reconfigure(&config(routes))?.success().map(drop)
}

fn names(ambassador: &Ambassador) -> Result<Vec<String>> {
    let status = ambassador.status()?;
    let routes = status["routes"].as_array().context("find the routes")?;
    Ok(routes.iter().map(|it| it["name"].as_str().unwrap_or_default().to_owned()).collect())
}

#[test]
fn routes_come_change_and_go_and_open_connections_do_not_notice() -> Result<()> {
    for way in Way::proxied()? {
        let here = Place::here();
        let [a, b] = [Echo::greeting("a")?, Echo::greeting("b")?];
        let [one, two] = [loopback(&here)?, loopback(&here)?];
        let first = config(&[route("one", &one, a.address())]);
        let ambassador = way.launch(&here)?.config(&first)?.start()?;
        let held = reaches(&one, "a")?;
        held.ask(b"first", b"first")?;
        held.ask(b"second", b"second")?;

        succeeds(&ambassador, &[route("one", &one, a.address()), route("two", &two, b.address())])?;
        ensure!(names(&ambassador)? == ["one", "two"], "by {way}");
        let other = reaches(&two, "b").with_context(|| format!("an added route, by {way}"))?;
        other.ask(b"first", b"first")?;
        held.ask(b"still here", b"still here")?;

        succeeds(&ambassador, &[route("one", &one, b.address()), route("two", &two, b.address())])?;
        reaches(&one, "b").with_context(|| format!("a changed route, by {way}"))?;
        held.ask(b"even now", b"even now")?;

        succeeds(&ambassador, &[route("two", &two, b.address())])?;
        refuses(&one).with_context(|| format!("a removed route, by {way}"))?;
        ensure!(names(&ambassador)? == ["two"], "by {way}");
        held.ask(&[b'x'; 100_000], &[b'x'; 100_000])?;
        other.ask(b"and now", b"and now")?;
        held.finish()?;
        held.hear_end()?;
        let record = until("the record of a route that is gone", SOON, || {
            let records = ambassador.access_records("route", "one")?;
            let ours =
                records.into_iter().find(|it| it["bytes_down"] == 1 + 5 + 6 + 10 + 8 + 100_000);
            Ok(ours)
        })?;
        ensure!(record["outcome"] == "ok" && record["tier"] == way.to_string(), "{record}");
        drop((held, other));
        ambassador.end().with_context(|| format!("by {way}"))?;
    }
    Ok(())
}

#[test]
fn a_route_that_is_renamed_or_changed_keeps_its_listener() -> Result<()> {
    let here = Place::here();
    let echo = Echo::greeting("e")?;
    let listen = loopback(&here)?;
    let before = config(&[route("before", &listen, echo.address())]);
    let ambassador = Way::Splice.launch(&here)?.config(&before)?.start()?;
    let socket = inode(&ambassador, &listen)?;
    succeeds(&ambassador, &[route("after", &listen, echo.address())])?;
    ensure!(inode(&ambassador, &listen)? == socket, "bound anew");
    reaches(&listen, "e")?;
    let record =
        until("a record", SOON, || Ok(ambassador.access_records("route", "after")?.pop()))?;
    ensure!(record["outcome"] == "ok" || record["outcome"] == "client_reset", "{record}");
    Ok(())
}

/// The socket that listens there, as /proc tells it.
fn inode(ambassador: &Ambassador, listen: &Address) -> Result<String> {
    let wanted = format!(":{:04X}", listen.port()?);
    let table = std::fs::read_to_string(format!("/proc/{}/net/tcp", ambassador.process.id()))?;
    let rows = table.lines().map(|row| row.split_whitespace().collect::<Vec<_>>());
    let mut listening = rows.filter(|row| row.get(3) == Some(&"0A") && row[1].ends_with(&wanted));
    Ok(listening.next().context("find the listener")?[9].to_owned())
}

#[test]
fn every_setting_of_a_route_follows() -> Result<()> {
    let here = Place::here();
    let echo = Echo::greeting("e")?;
    let listen = loopback(&here)?;
    let with = |more| config(&[Route { more, ..route("one", &listen, echo.address()) }]);
    let ambassador = Way::Splice.launch(&here)?.config(&with(""))?.start()?;
    let held = reaches(&listen, "e")?;

    ambassador.reconfigure(&with("max_connections: 1"))?.success()?;
    let refused = listen.connect()?;
    refused.hear_close().context("one that was open before counts for the limit")?;
    ambassador.reconfigure(&with("max_connections: 2"))?.success()?;
    reaches(&listen, "e")?;

    ambassador.reconfigure(&with("idle_timeout: 300ms"))?.success()?;
    reaches(&listen, "e")?.hear_close()?;
    held.ask(b"no timeout", b"no timeout").context("held by the route of then")?;

    ambassador.reconfigure(&with("tier: copy"))?.success()?;
    let status = ambassador.status()?;
    ensure!(status["routes"][0]["tier"] == "copy", "{status}");
    Ok(())
}

#[test]
fn a_unix_socket_comes_changes_its_mode_and_goes() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;

    let here = Place::here();
    let echo = Echo::greeting("e")?;
    let tcp = loopback(&here)?;
    let base = config(&[route("tcp", &tcp, echo.address())]);
    let ambassador = Way::Splice.launch(&here)?.config(&base)?.start()?;
    let path = ambassador.configuration().with_file_name("route.sock");
    let listen = Address::Unix(path.clone());
    let with = |more| {
        let routes = [
            route("tcp", &tcp, echo.address()),
            Route { more, ..route("socket", &listen, echo.address()) },
        ];
        succeeds(&ambassador, &routes)
    };
    let mode = || Ok::<_, anyhow::Error>(std::fs::metadata(&path)?.permissions().mode() & 0o777);
    with("")?;
    ensure!(mode()? == 0o666);
    let held = reaches(&listen, "e")?;
    with("socket_mode: '0600'")?;
    ensure!(mode()? == 0o600);
    reaches(&listen, "e")?;
    ambassador.reconfigure(&base)?.success()?;
    ensure!(!path.exists(), "the socket is left behind");
    held.ask(b"still here", b"still here")
}

#[test]
fn an_address_may_take_the_place_of_all_addresses_and_the_other_way_round() -> Result<()> {
    let here = Place::here();
    let echo = Echo::greeting("e")?;
    let one = loopback(&here)?;
    let all = Address::from(SocketAddr::from((Ipv4Addr::UNSPECIFIED, one.port()?)));
    let first = config(&[route("r", &one, echo.address())]);
    let ambassador = Way::Splice.launch(&here)?.config(&first)?.start()?;
    for listen in [&all, &one] {
        succeeds(&ambassador, &[route("r", listen, echo.address())])?;
        reaches(&one, "e").with_context(|| format!("once it listens on {listen}"))?;
        ensure!(listen.listen().is_err(), "others can listen there too");
    }
    Ok(())
}

#[test]
fn figures_go_on_and_those_of_a_route_that_is_gone_go_with_its_last_connection() -> Result<()> {
    let here = Place::here();
    let echo = Echo::greeting("e")?;
    let [one, two] = [loopback(&here)?, loopback(&here)?];
    let both = |more| {
        let first = Route { more, ..route("one", &one, echo.address()) };
        config(&[first, route("two", &two, echo.address())])
    };
    let ambassador = Way::Splice.launch(&here)?.config(&both(""))?.start()?;
    let held = reaches(&one, "e")?;
    held.ask(&[b'x'; 1000], &[b'x'; 1000])?;
    reaches(&one, "e")?;
    let ended = |route| {
        let sum = ambassador.metrics()?.sum("ambassador_connections_total", &[("route", route)]);
        Ok::<_, anyhow::Error>(sum)
    };
    until_true("the first to be counted", || Ok(ended("one")? == Some(1.0)))?;
    ambassador.reconfigure(&both("max_connections: 5"))?.success()?;
    ensure!(ended("one")? == Some(1.0), "counted anew");
    ensure!(ambassador.status()?["routes"][0]["connections"] == 1, "{}", ambassador.status()?);
    reaches(&one, "e")?;
    until_true("the next to be counted", || Ok(ended("one")? == Some(2.0)))?;

    succeeds(&ambassador, &[route("two", &two, echo.address())])?;
    let metrics = ambassador.get("/metrics")?.body;
    ensure!(metrics.contains("route=\"one\""), "a connection is open, and its figures are gone");
    drop(held);
    until_true("its figures to go", || {
        Ok(!ambassador.get("/metrics")?.body.contains("route=\"one\""))
    })?;
    ambassador.reconfigure(&both(""))?.success()?;
    let labels = [("route", "one"), ("tier", "splice")];
    let active = ambassador.metrics()?.sum("ambassador_connections_active", &labels);
    ensure!(active == Some(0.0) && ended("one")?.is_none(), "{active:?}");
    Ok(())
}

#[test]
fn a_tier_that_was_ordered_outlives_a_reload() -> Result<()> {
    let here = Place::here();
    let echo = Echo::greeting("e")?;
    let [one, two] = [loopback(&here)?, loopback(&here)?];
    let first = config(&[route("one", &one, echo.address())]);
    let ambassador = Way::Splice.launch(&here)?.config(&first)?.start()?;
    ambassador.command(&["tier", "all", "copy"])?.success()?;
    succeeds(
        &ambassador,
        &[route("one", &two, echo.address()), route("two", &one, echo.address())],
    )?;
    let tiers = |status: serde_json::Value| {
        [0, 1].map(|at: usize| status["routes"][at]["tier"].as_str().map(str::to_owned))
    };
    ensure!(tiers(ambassador.status()?) == ["copy", "copy"].map(|it| Some(it.to_owned())));
    ambassador.command(&["tier", "all", "auto"])?.success()?;
    ensure!(tiers(ambassador.status()?) == ["splice", "splice"].map(|it| Some(it.to_owned())));
    Ok(())
}

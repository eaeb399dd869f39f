//! Where connections lead where `direct` is not as the relays: past addresses that do not answer; and that
//! tables in the kernel follow names. What is the same is told by `upstream.rs`, on every way.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::epoll::EventFlags;
use socket2::{Domain, Socket, Type};

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador::{Ambassador, Launch};
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::peer::{Listener, Peer};
use ambassador_tests::place::Place;
use ambassador_tests::process::run;
use ambassador_tests::readiness::Readiness;
use ambassador_tests::server::dnsmasq::Dnsmasq;
use ambassador_tests::wait::{SOON, until, until_true};
use ambassador_tests::{needs, pod};

use crate::{ROUTE, all_are_direct, hold, is_direct, listen, loopback, start_with, tally, tier_of};

const NAME: &str = "service.test";
/// For how long an address that did not answer is passed over.
const SUSPICION: Duration = Duration::from_secs(5);

#[test]
fn failover_leaves_an_endpoint_that_refuses_and_returns_to_it() -> Result<()> {
    needs!(Direct);
    let (first, second) = (Echo::greeting("1")?, Echo::greeting("2")?);
    let address = first.address().clone();
    let (ambassador, route) = balanced("failover", &[(&address, 1), (second.address(), 1)])?;
    let held = hold(&route, 5)?;
    ensure!(tally(&held) == [("1", 5)].into());
    all_are_direct(&ambassador, &held)?;

    drop(first);
    // The one that finds out is told what a direct connection is told.
    let refused = route.connect().map(drop).expect_err("nobody listens there any more");
    ensure!(format!("{refused:#}").contains("refused"), "{refused:#}");
    let refused = Instant::now();
    ensure!(tally(&hold(&route, 5)?) == [("2", 5)].into());

    let _first = Echo::on(address.listen()?, "1");
    until_true("a return to the first endpoint", || Ok(greeted(&route, 1)?.0 == "1"))?;
    ensure!(refused.elapsed() >= SUSPICION, "after only {:?}", refused.elapsed());
    Ok(())
}

#[test]
fn where_no_way_leads_nobody_is_led() -> Result<()> {
    needs!(Direct);
    let pod = pod!();
    let mut add = pod.inside.command("ip");
    run(add.args(["-6", "route", "add", "unreachable", "2001:db8::/32"]), SOON)?;
    let listener = pod.upstream.enter(|| {
        Address::from(SocketAddr::from((pod.upstream.ipv4, pod.upstream.port()?))).listen()
    })?;
    let echo = Echo::on(listener, "e");
    let place = pod.inside.with_bpffs()?;
    let route = Address::from(SocketAddr::from((Ipv6Addr::LOCALHOST, place.port()?)));
    let port = echo.address().port()?;
    let config = format!(
        "{{version: 1, routes: [{{name: {ROUTE}, listen: '{route}', upstream: u}}], upstreams: \
         {{u: {{endpoints: ['[2001:db8::1]:{port}', '{}'], balance: round_robin}}}}}}",
        echo.address()
    );
    let ambassador = Launch::new(&place)?.in_kernel("direct")?.config(&config)?.start()?;
    let held = pod.inside.enter(|| hold(&route, 6))?;
    ensure!(tally(&held) == [("e", 6)].into());
    let all = ambassador.connections()?;
    ensure!(all.len() == 6 && all.iter().all(|it| it["tier"] == "direct"), "{all:?}");
    Ok(())
}

#[test]
fn a_server_that_goes_costs_no_app_a_failed_connect() -> Result<()> {
    needs!(Direct);
    let first = Listener::new(Family::Tcp)?;
    let second = Echo::greeting("2")?;
    let endpoints = [(first.address(), 1), (second.address(), 1)];
    let (ambassador, route) = balanced("failover", &endpoints)?;
    let apps = (0..10).map(|_| {
        let app = route.connect()?;
        Ok((app, first.accept()?))
    });
    let (apps, served): (Vec<_>, Vec<_>) = apps.collect::<Result<Vec<_>>>()?.into_iter().unzip();
    is_direct(&ambassador, &apps[0])?;
    // As a process does that is killed.
    drop(first);
    drop(served);
    for app in apps {
        app.hear_end()?;
        ensure!(greeted(&route, 1)?.0 == "2");
    }
    Ok(())
}

#[test]
fn a_server_that_ends_all_its_connections_itself_is_soon_led_to_again() -> Result<()> {
    needs!(Direct);
    let (first, second) = (Listener::new(Family::Tcp)?, Echo::greeting("2")?);
    let endpoints = [(first.address(), 1), (second.address(), 1)];
    let (ambassador, route) = balanced("failover", &endpoints)?;
    let mut in_a_row = 0;
    until("twenty direct connections in a row", Duration::from_secs(30), || {
        let app = route.connect()?;
        let server = first.accept()?;
        in_a_row = if tier_of(&ambassador, &app)? == "direct" { in_a_row + 1 } else { 0 };
        drop(server);
        app.hear_end()?;
        Ok((in_a_row == 20).then_some(()))
    })
}

#[test]
fn while_nobody_listens_doubt_gets_no_app_refused() -> Result<()> {
    needs!(Direct);
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
        let place = Place::here().with_bpffs()?;
        let route = Address::from(SocketAddr::new(ip, place.port()?));
        let (first, second) = (Listener::new(Family::Tcp)?, Echo::greeting("2")?);
        let config = format!(
            "{{version: 1, routes: [{{listen: '{route}', upstream: u}}], \
             upstreams: {{u: {{endpoints: ['{}', '{}']}}}}}}",
            first.address(),
            second.address()
        );
        let ambassador = Launch::new(&place)?.in_kernel("direct")?.config(&config)?.start()?;
        let app = route.connect()?;
        let server = first.accept()?;
        drop(ambassador);
        ensure!(route.listen().is_ok(), "somebody listens at {route}");
        // From here on the server is in doubt.
        drop(server);
        app.hear_end()?;
        let _app = route.connect().with_context(|| format!("connect to {route}"))?;
        first.accept()?;
    }
    Ok(())
}

#[test]
fn when_all_endpoints_are_suspected_the_listener_tries_them() -> Result<()> {
    needs!(Direct);
    let (first, second) = (loopback(&Place::here())?, loopback(&Place::here())?);
    let (ambassador, route) = balanced("failover", &[(&first, 1), (&second, 1)])?;
    for _ in 0..2 {
        ensure!(route.connect().is_err(), "a connection to nobody");
    }
    let _back = Echo::on(second.listen()?, "2");
    let (greeting, client) = greeted(&route, 1)?;
    ensure!(greeting == "2");
    ensure!(tier_of(&ambassador, &client)? != "direct");
    Ok(())
}

#[test]
fn round_robin_passes_over_an_endpoint_that_refuses() -> Result<()> {
    needs!(Direct);
    let (one, two) = (Echo::greeting("1")?, Echo::greeting("2")?);
    let dead = loopback(&Place::here())?;
    let endpoints = [(one.address(), 1), (&dead, 1), (two.address(), 1)];
    let (ambassador, route) = balanced("round_robin", &endpoints)?;
    let reached: Vec<_> = (0..30).filter_map(|_| greeted(&route, 1).ok()).collect();
    ensure!(reached.len() == 29, "{} of 30 connections reached an endpoint", reached.len());
    ensure!(tally(&reached).values().all(|&count| count >= 9), "{:?}", tally(&reached));
    all_are_direct(&ambassador, &reached)
}

#[test]
fn a_silent_endpoint_is_suspected_at_the_first_packet_sent_again() -> Result<()> {
    needs!(Direct);
    let pod = pod!("nft");
    let silent = Address::from(SocketAddr::from((pod.upstream.ipv4, pod.upstream.port()?)));
    pod.upstream.blackhole(&format!("tcp dport {}", silent.port()?))?;
    let echo = Echo::on(listen(&pod.upstream, pod.upstream.ipv4)?, "e");
    let endpoints = format!("endpoints: ['{silent}', '{}']", echo.address());
    let (_ambassador, route) = start_with(&pod.inside, "", &endpoints)?;
    let reach = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        let begun = socket.connect(&route.tcp()?.into()).err().and_then(|it| it.raw_os_error());
        ensure!(begun == Some(libc::EINPROGRESS), "{begun:?}");
        Ok(socket)
    };
    // One that is given up makes the endpoint suspected too, so they are all kept.
    let mut waiting = vec![pod.inside.enter(reach)?];
    let begun = Instant::now();
    until_true("a connection past the silent endpoint", || {
        let socket = pod.inside.enter(reach)?;
        let connected =
            Readiness::of(&socket, EventFlags::OUT)?.within(Duration::from_millis(50))?;
        if connected.is_none() {
            waiting.push(socket);
            return Ok(false);
        }
        socket.set_nonblocking(false)?;
        Ok(Peer::of(socket)?.hear(1)? == b"e")
    })?;
    // The first SYN is sent again after a second.
    ensure!(begun.elapsed() < Duration::from_secs(3), "only after {:?}", begun.elapsed());
    Ok(())
}

#[test]
fn apps_that_change_their_minds_speak_against_nobody() -> Result<()> {
    needs!(Direct);
    let pod = pod!("nft");
    let slow = Address::from(SocketAddr::from((pod.upstream.ipv4, pod.upstream.port()?)));
    pod.upstream.blackhole(&format!("tcp dport {}", slow.port()?))?;
    let other = Echo::on(listen(&pod.upstream, pod.upstream.ipv4)?, "o");
    let endpoints = format!("endpoints: ['{slow}', '{}']", other.address());
    let (ambassador, route) = start_with(&pod.inside, "", &endpoints)?;
    pod.inside.enter(|| {
        for _ in 0..10 {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            ensure!(socket.connect(&route.tcp()?.into()).is_err(), "it cannot be there yet");
        }
        Ok(())
    })?;
    until_true("ten records", || {
        Ok(ambassador.access_records("outcome", "client_reset")?.len() == 10)
    })?;
    let endpoint = &ambassador.status()?["routes"][0]["endpoints"][0];
    ensure!(
        (&endpoint["healthy"], &endpoint["ejections"]) == (&true.into(), &0.into()),
        "{endpoint}"
    );
    Ok(())
}

#[test]
fn all_addresses_of_a_name_are_used_and_a_change_of_them_reaches_the_kernel() -> Result<()> {
    needs!(Direct);
    let pod = pod!("dnsmasq");
    let more = Ipv4Addr::new(10, 77, 0, 3);
    let add = format!("{more}/24");
    run(pod.upstream.command("ip").args(["addr", "add", &add, "dev", "eth0"]), SOON)?;
    let old = listen(&pod.upstream, pod.upstream.ipv4)?;
    let port = old.address().port()?;
    let new = Address::from(SocketAddr::from((more, port)));
    let (old, new) = (Echo::on(old, "o"), Echo::on(pod.upstream.enter(|| new.listen())?, "n"));
    let dns = Dnsmasq::start(&pod.upstream, &[(NAME, pod.upstream.ipv4.into())])?;
    let place = pod.inside.with_resolver(&Dnsmasq::resolv_conf(pod.upstream.ipv4))?;
    let route = loopback(&pod.inside)?;
    let config = format!(
        "version: 1
routes: [{{ name: {ROUTE}, listen: '{route}', upstream: up }}]
upstreams: {{ up: {{ endpoints: ['{NAME}:{port}'], dns: {{ max_ttl: 1s }} }} }}
"
    );
    let ambassador =
        Launch::new(&place.with_bpffs()?)?.in_kernel("direct")?.config(&config)?.start()?;
    let reaches = |wanted: &str| {
        until_true(&format!("a direct connection to {wanted}"), || {
            let (heard, client) = pod.inside.enter(|| greeted(&route, 1))?;
            Ok(heard == wanted && tier_of(&ambassador, &client)? == "direct")
        })
    };
    reaches("o").context("the only address")?;
    ensure!(new.accepted() == 0);
    dns.answer(&[(NAME, pod.upstream.ipv4.into()), (NAME, more.into())])?;
    reaches("n").context("the address that joined")?;
    let held = pod.inside.enter(|| hold(&route, 10))?;
    ensure!(tally(&held) == [("n", 5), ("o", 5)].into(), "{:?}", tally(&held));

    dns.answer(&[(NAME, more.into())])?;
    let left = || Ok(tally(&pod.inside.enter(|| hold(&route, 4))?) == [("n", 4)].into());
    until_true("the address that left to be left", left)?;
    // What is established stays where it is.
    held.iter().try_for_each(|(_, client)| client.ask(b"still there?", b"still there?"))?;
    ensure!(old.accepted() > 0);
    Ok(())
}

/// An ambassador here with one route to these endpoints and weights.
fn balanced(balance: &str, endpoints: &[(&Address, u16)]) -> Result<(Ambassador, Address)> {
    let endpoints: Vec<_> =
        endpoints.iter().map(|(address, weight)| format!("'{address}:{weight}'")).collect();
    let upstream = format!("balance: {balance}, endpoints: [{}]", endpoints.join(", "));
    start_with(&Place::here(), "", &upstream)
}

//! Whose connections are taken, and what an app sees of it: those of its own namespace and cgroup that
//! chose nothing but the address.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador::Launch;
use ambassador_tests::cgroup::{self, Cgroup};
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::peer::Peer;
use ambassador_tests::place::Place;
use ambassador_tests::process::Process;
use ambassador_tests::wait::{SOON, until_true};
use ambassador_tests::way::Way;
use ambassador_tests::{needs, pod, skip};

use crate::{connect_bound, is_direct, listen, loopback, start, the_connection, tier_of};

#[test]
fn an_app_in_another_namespace_is_left_alone() -> Result<()> {
    needs!(Direct);
    let pod = pod!();
    let echo = Echo::on(listen(&pod.upstream, pod.upstream.ipv4)?, "u");
    let route = loopback(&pod.inside)?;
    let _ambassador = start(&pod.inside, &route, echo.address())?;
    let _other = Echo::on(pod.upstream.enter(|| route.listen())?, "o");
    ensure!(pod.upstream.enter(|| greeted(&route, 1))?.0 == "o");
    ensure!(pod.inside.enter(|| greeted(&route, 1))?.0 == "u");
    Ok(())
}

#[test]
fn an_app_in_another_cgroup_goes_to_the_listener() -> Result<()> {
    needs!(Direct);
    let here = Place::here();
    // Who is redirected is refused; who comes to the listener is let in, and sent away.
    let (route, dead) = (loopback(&here)?, loopback(&here)?);
    let _ambassador = start(&here, &route, &dead)?;
    let probe = |cgroup: Option<&Cgroup>| {
        let mut probe = here.command("bash");
        probe.args(["-c", &format!(": </dev/tcp/127.0.0.1/{}", route.port()?)]);
        cgroup.map_or(Ok(()), |cgroup| cgroup.start_in(&mut probe))?;
        Process::start(&mut probe)?.finish(SOON)
    };
    ensure!(probe(None)?.code() == Some(1), "an app in the cgroup was not redirected");
    let elsewhere = Cgroup::new()?;
    probe(Some(&elsewhere))?.success().context("an app in another cgroup")?;
    let below = Cgroup::below(cgroup::of_this_process()?)?;
    ensure!(probe(Some(&below))?.code() == Some(1), "an app in a cgroup below was not redirected");
    Ok(())
}

#[test]
fn a_bound_source_goes_to_the_listener() -> Result<()> {
    needs!(Direct);
    let echo = Echo::greeting("e")?;
    let route = loopback(&Place::here())?;
    let ambassador = start(&Place::here(), &route, echo.address())?;
    let client = connect_bound(&route)?;
    ensure!(client.hear(1)? == b"e");
    ensure!(tier_of(&ambassador, &client)? == "splice");
    Ok(())
}

#[test]
fn an_ipv6_app_reaches_an_ipv6_endpoint_and_sees_what_it_asked_for() -> Result<()> {
    needs!(Direct);
    if let Some(obstacle) = Way::Direct.obstacle(Family::Tcp6)? {
        skip!("{obstacle}");
    }
    let echo = Echo::new(Family::Tcp6)?;
    let route = ipv6_loopback()?;
    let ambassador = start(&Place::here(), &route, echo.address())?;
    let client = route.connect()?;
    client.ask(b"hello", b"hello")?;
    is_direct(&ambassador, &client)?;
    ensure!(peer_of(&client)? == route.tcp()?, "{}", peer_of(&client)?);
    Ok(())
}

/// An IPv4 endpoint takes a v4-mapped address, which a socket that is IPv6 only does not have.
#[test]
fn an_ipv6_app_reaches_an_ipv4_endpoint_whatever_its_socket_allows() -> Result<()> {
    needs!(Direct);
    if let Some(obstacle) = Way::Direct.obstacle(Family::Tcp6)? {
        skip!("{obstacle}");
    }
    let echo = Echo::greeting("e")?;
    let route = ipv6_loopback()?;
    let ambassador = start(&Place::here(), &route, echo.address())?;
    for only_v6 in [false, true] {
        let client = ipv6_socket(only_v6, route.tcp()?)?;
        ensure!(client.hear(1)? == b"e");
        ensure!(peer_of(&client)? == route.tcp()?, "{}", peer_of(&client)?);
        if only_v6 {
            ensure!(tier_of(&ambassador, &client)? != "direct");
        }
    }
    Ok(())
}

#[test]
fn a_v4_mapped_address_is_redirected_and_seen_as_asked_for() -> Result<()> {
    needs!(Direct);
    let echo = Echo::greeting("e")?;
    let route = loopback(&Place::here())?;
    let ambassador = start(&Place::here(), &route, echo.address())?;
    let mapped = SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), route.port()?));
    let client = ipv6_socket(false, mapped)?;
    ensure!(client.hear(1)? == b"e");
    is_direct(&ambassador, &client)?;
    ensure!(peer_of(&client)? == mapped, "{}", peer_of(&client)?);
    Ok(())
}

#[test]
fn udp_to_the_same_port_is_left_alone() -> Result<()> {
    needs!(Direct);
    let echo = Echo::greeting("e")?;
    let route = loopback(&Place::here())?;
    let _ambassador = start(&Place::here(), &route, echo.address())?;
    let server = UdpSocket::bind(route.tcp()?)?;
    server.set_read_timeout(Some(SOON))?;
    let client = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    client.connect(route.tcp()?)?;
    ensure!(client.peer_addr()? == route.tcp()?);
    client.send(b"datagram")?;
    let mut heard = [0; 16];
    ensure!(server.recv(&mut heard)? == 8 && heard.starts_with(b"datagram"));
    Ok(())
}

#[test]
fn a_socket_may_connect_elsewhere_after_it_was_redirected() -> Result<()> {
    needs!(Direct);
    let here = Place::here();
    let (route, dead) = (loopback(&here)?, loopback(&here)?);
    let ambassador = start(&here, &route, &dead)?;
    let other = Echo::greeting("o")?;
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    ensure!(socket.connect(&route.tcp()?.into()).is_err(), "a connection to nobody");
    socket.connect(&other.address().tcp()?.into()).context("connect elsewhere")?;
    let client = Peer::of(socket)?;
    ensure!(client.hear(1)? == b"o");
    ensure!(peer_of(&client)? == other.address().tcp()?, "{}", peer_of(&client)?);
    ensure!(ambassador.connections()?.is_empty(), "it is taken for one of ours");
    Ok(())
}

/// Else a relay would be led past its own listeners, and counted twice.
#[test]
fn the_ambassador_s_own_connections_are_left_alone() -> Result<()> {
    needs!(Direct);
    let here = Place::here();
    let echo = Echo::greeting("e")?;
    let (outer, inner) = (loopback(&here)?, loopback(&here)?);
    let ambassador = Launch::new(&here.with_bpffs()?)?
        .in_kernel("direct")?
        .route(format!("outer:{outer}={inner}"))
        .route(format!("inner:{inner}={}", echo.address()))
        .start()?;
    let client = connect_bound(&outer)?;
    ensure!(client.hear(1)? == b"e");
    let told = ambassador.connections()?;
    let mut carried: Vec<_> = told.iter().map(|it| (&it["route"], &it["tier"])).collect();
    carried.sort_unstable_by_key(|(route, _)| route.as_str());
    let carried = format!("{carried:?}");
    ensure!(told.len() == 2 && !carried.contains("direct"), "{carried}");
    drop(client);

    // An app is led to the address that the outer route leads to, and no further.
    until_true("the end of both", || Ok(ambassador.connections()?.is_empty()))?;
    let (greeting, _client) = greeted(&outer, 1)?;
    ensure!(greeting == "e");
    until_true("both halves", || Ok(ambassador.connections()?.len() == 2))
}

#[test]
fn pods_in_one_cgroup_do_not_meet_though_their_ports_are_the_same() -> Result<()> {
    needs!(Direct);
    let (one, two) = (pod!(), pod!());
    let route = loopback(&one.inside)?;
    let mut all = Vec::new();
    for (pod, greeting) in [(&one, "1"), (&two, "2")] {
        let echo = Echo::on(listen(&pod.upstream, pod.upstream.ipv4)?, greeting);
        all.push((start(&pod.inside, &route, echo.address())?, pod, greeting, echo));
    }
    for (ambassador, pod, expected, _) in &all {
        let (heard, _client) = pod.inside.enter(|| greeted(&route, 1))?;
        ensure!(heard == *expected, "{heard} where {expected} should be");
        ensure!(the_connection(ambassador)?["tier"] == "direct");
    }
    Ok(())
}

#[test]
fn two_ambassadors_of_one_pod_serve_their_own_routes() -> Result<()> {
    needs!(Direct);
    let here = Place::here().with_bpffs()?;
    let (one, two) = (Echo::greeting("1")?, Echo::greeting("2")?);
    let mut all = Vec::new();
    for (name, echo) in [("one", &one), ("two", &two)] {
        let route = loopback(&here)?;
        let launch = Launch::new(&here)?.in_kernel("direct")?.flag("--instance", name);
        let ambassador = launch.route(format!("{name}:{route}={}", echo.address())).start()?;
        all.push((ambassador, route));
    }
    for ((ambassador, route), expected) in all.iter().zip(["1", "2"]) {
        let (heard, _client) = greeted(route, 1)?;
        ensure!(heard == expected, "{heard} where {expected} should be");
        ensure!(the_connection(ambassador)?["tier"] == "direct");
    }
    let (second, route) = all.pop().context("take the second")?;
    second.end()?;
    ensure!(route.connect().is_err(), "redirected by nobody");
    ensure!(greeted(&all[0].1, 1)?.0 == "1", "the end of one ambassador is the end of the other");
    Ok(())
}

fn ipv6_loopback() -> Result<Address> {
    Ok(SocketAddr::from((Ipv6Addr::LOCALHOST, Place::here().port()?)).into())
}

fn ipv6_socket(only_v6: bool, to: SocketAddr) -> Result<Peer> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
    socket.set_only_v6(only_v6)?;
    socket.connect(&to.into()).with_context(|| format!("connect to {to}"))?;
    Peer::of(socket)
}

fn peer_of(client: &Peer) -> Result<SocketAddr> {
    client.socket().peer_addr()?.as_socket().context("ask for the peer's address")
}

//! Which upstream a connection reaches: balancing, failing over, endpoints that fail, and names that change.

mod balance;
mod ejection;
mod hash;
mod health;
mod kinds;
mod limits;
mod returning;
mod silent;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::{Ambassador, Launch};
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::peer::{Listener, Peer};
use ambassador_tests::place::Place;
use ambassador_tests::pod;
use ambassador_tests::pod::Pod;
use ambassador_tests::process::run;
use ambassador_tests::server::dnsmasq::Dnsmasq;
use ambassador_tests::wait::{SOON, until, until_true};
use ambassador_tests::way::Way;

#[test]
fn failover_takes_the_first_endpoint_that_works() -> Result<()> {
    let (first, second) = (Echo::greeting("1")?, Echo::greeting("2")?);
    let address = first.address().clone();
    let endpoints = [(&address, 1), (second.address(), 1)];
    let (_ambassador, route) = balanced_with(Way::Splice, "failover", &endpoints, "eject: none")?;
    ensure!(tally(&hold(&route, 5)?) == [("1", 5)].into());
    drop(first);
    ensure!(tally(&hold(&route, 5)?) == [("2", 5)].into());
    let _first = Echo::on(address.listen()?, "1");
    ensure!(tally(&hold(&route, 5)?) == [("1", 5)].into());
    Ok(())
}

#[test]
fn round_robin_spreads_by_weight() -> Result<()> {
    for way in Way::proxied()? {
        let (light, heavy) = (Echo::greeting("l")?, Echo::greeting("h")?);
        let endpoints = [(light.address(), 1), (heavy.address(), 3)];
        let (ambassador, route) = balanced_by(way, "round_robin", &endpoints)?;
        let held = hold(&route, 40)?;
        ensure!(tally(&held) == [("h", 30), ("l", 10)].into(), "{way}: {:?}", tally(&held));
        are_direct_or_not(&ambassador, way)?;
    }
    Ok(())
}

#[test]
fn round_robin_passes_over_a_dead_endpoint() -> Result<()> {
    let (one, two) = (Echo::greeting("1")?, Echo::greeting("2")?);
    let (_ambassador, route) =
        balanced("round_robin", &[(one.address(), 1), (&dead()?, 1), (two.address(), 1)])?;
    let held = hold(&route, 30)?;
    let reached = tally(&held);
    ensure!(reached.keys().eq(&["1", "2"]), "{reached:?}");
    Ok(())
}

#[test]
fn least_connections_fills_the_emptiest() -> Result<()> {
    for way in Way::proxied()? {
        let (one, two) = (Echo::greeting("1")?, Echo::greeting("2")?);
        let endpoints = [(one.address(), 1), (two.address(), 1)];
        let (ambassador, route) = balanced_by(way, "least_connections", &endpoints)?;
        let held = hold(&route, 10)?;
        ensure!(tally(&held) == [("1", 5), ("2", 5)].into(), "{way}: {:?}", tally(&held));

        let (gone, _kept): (Vec<_>, Vec<_>) = held.into_iter().partition(|(name, _)| name == "1");
        drop(gone);
        until_true("the end of five connections", || {
            Ok(ambassador.access_records("outcome", "ok")?.len() == 5)
        })?;
        let more = hold(&route, 5)?;
        ensure!(tally(&more) == [("1", 5)].into(), "{way}: {:?}", tally(&more));
        are_direct_or_not(&ambassador, way)?;
    }
    Ok(())
}

#[test]
fn attempts_go_over_the_remaining_endpoints() -> Result<()> {
    let last = Echo::greeting("3")?;
    let (_ambassador, route) =
        balanced("failover", &[(&dead()?, 1), (&dead()?, 1), (last.address(), 1)])?;
    ensure!(tally(&hold(&route, 3)?) == [("3", 3)].into());
    Ok(())
}

#[test]
fn attempts_are_bounded() -> Result<()> {
    let last = Echo::greeting("4")?;
    // The default is three attempts.
    let endpoints = [(&dead()?, 1), (&dead()?, 1), (&dead()?, 1), (last.address(), 1)];
    let (_ambassador, route) = balanced("failover", &endpoints)?;
    route.connect()?.hear_close()?;
    ensure!(last.accepted() == 0, "a fourth attempt was made");
    Ok(())
}

#[test]
fn an_unreachable_upstream_is_logged_and_counted() -> Result<()> {
    let endpoint = dead()?;
    let (ambassador, route) = balanced("failover", &[(&endpoint, 1)])?;
    route.connect()?.hear_close()?;
    let warning = until("the warning", SOON, || {
        let log = ambassador.log()?;
        Ok(log.into_iter().find(|line| line["level"] == "WARN" && line["route"] == "balanced"))
    })?;
    ensure!(warning.to_string().contains(&endpoint.to_string()), "{warning}");
    until_true("the failed connection in the metrics", || {
        let failed = [("route", "balanced"), ("outcome", "connect_failed")];
        Ok(ambassador.metrics()?.sum("ambassador_connections_total", &failed) == Some(1.0))
    })
}

#[test]
fn a_silent_endpoint_costs_one_connect_timeout() -> Result<()> {
    let pod = pod!("nft");
    let echo = Echo::on(listen(&pod, pod.upstream.ipv4.into())?, "e");
    let silent = SocketAddr::from((pod.upstream.ipv4, pod.upstream.port()?));
    pod.upstream.blackhole(&format!("tcp dport {}", silent.port()))?;
    let (_ambassador, route) = place_balanced(
        &pod.inside,
        "failover",
        &format!("'{silent}', '{}'", echo.address()),
        "connect: { timeout: 400ms }",
    )?;
    let started = Instant::now();
    let client = pod.inside.enter(|| route.connect())?;
    ensure!(client.hear(1)? == b"e");
    let took = started.elapsed();
    ensure!(took >= Duration::from_millis(400), "only {took:?}");
    ensure!(took < Duration::from_millis(2000), "more than one timeout: {took:?}");
    Ok(())
}

#[test]
fn a_name_may_come_into_being_after_the_start() -> Result<()> {
    let pod = pod!("dnsmasq");
    let dns = Dnsmasq::start(&pod.upstream, &[])?;
    let echo = Echo::on(listen(&pod, pod.upstream.ipv4.into())?, "e");
    let (ambassador, route) = named(&pod, echo.address().port()?)?;
    pod.inside.enter(|| route.connect())?.hear_close()?;
    dns.answer(&[(NAME, pod.upstream.ipv4.into())])?;
    until_reaches(&ambassador, &pod, &route, "e")
}

#[test]
fn a_name_is_followed_to_its_new_address() -> Result<()> {
    let pod = pod!("dnsmasq");
    let (old, new) = two_addresses(&pod)?;
    let dns = Dnsmasq::start(&pod.upstream, &[(NAME, old.address().tcp()?.ip())])?;
    let (ambassador, route) = named(&pod, old.address().port()?)?;
    until_reaches(&ambassador, &pod, &route, "o")?;
    let held = pod.inside.enter(|| route.connect())?;
    ensure!(held.hear(1)? == b"o");
    dns.answer(&[(NAME, new.address().tcp()?.ip())])?;
    until_reaches(&ambassador, &pod, &route, "n")?;
    // What is established stays where it is.
    held.ask(b"still there?", b"still there?")
}

#[test]
fn a_name_stays_known_when_its_server_dies() -> Result<()> {
    let pod = pod!("dnsmasq");
    let dns = Dnsmasq::start(&pod.upstream, &[(NAME, pod.upstream.ipv4.into())])?;
    let echo = Echo::on(listen(&pod, pod.upstream.ipv4.into())?, "e");
    let (ambassador, route) = named(&pod, echo.address().port()?)?;
    until_reaches(&ambassador, &pod, &route, "e")?;
    drop(dns);
    until("the ambassador's notice of the death", Duration::from_secs(45), || {
        let warned = ambassador.log()?.into_iter().any(|line| {
            line["level"] == "WARN" && line.to_string().contains("last good addresses")
        });
        Ok(warned.then_some(()))
    })?;
    let client = pod.inside.enter(|| route.connect())?;
    ensure!(client.hear(1)? == b"e");
    Ok(())
}

#[test]
fn a_broken_family_is_passed_over_quickly() -> Result<()> {
    let pod = pod!("dnsmasq", "nft");
    let echo = Echo::on(listen(&pod, pod.upstream.ipv4.into())?, "e");
    let both = [(NAME, pod.upstream.ipv6.into()), (NAME, pod.upstream.ipv4.into())];
    let _dns = Dnsmasq::start(&pod.upstream, &both)?;
    let port = echo.address().port()?;
    pod.upstream.blackhole(&format!("ip6 daddr {} tcp dport {port}", pod.upstream.ipv6))?;
    let (ambassador, route) = named(&pod, port)?;
    until_reaches(&ambassador, &pod, &route, "e")?;
    // Whichever family has its turn: none costs a whole connect timeout of two seconds.
    for _ in 0..4 {
        let started = Instant::now();
        let client = pod.inside.enter(|| route.connect())?;
        ensure!(client.hear(1)? == b"e");
        let took = started.elapsed();
        ensure!(took < Duration::from_millis(1500), "the other family took {took:?}");
    }
    Ok(())
}

#[test]
fn all_addresses_of_a_name_are_used() -> Result<()> {
    let pod = pod!("dnsmasq");
    let (old, new) = two_addresses(&pod)?;
    let both = [&old, &new].map(|echo| echo.address().tcp().map(|address| (NAME, address.ip())));
    let both = both.into_iter().collect::<Result<Vec<_>>>()?;
    let _dns = Dnsmasq::start(&pod.upstream, &both)?;
    let (ambassador, route) = named(&pod, old.address().port()?)?;
    until_reaches(&ambassador, &pod, &route, "o")?;
    until_reaches(&ambassador, &pod, &route, "n")
}

const NAME: &str = "service.test";

/// An ambassador here with one route to these endpoints and weights.
fn balanced(balance: &str, endpoints: &[(&Address, u16)]) -> Result<(Ambassador, Address)> {
    balanced_by(Way::Splice, balance, endpoints)
}

/// The same, this way.
fn balanced_by(
    way: Way,
    balance: &str,
    endpoints: &[(&Address, u16)],
) -> Result<(Ambassador, Address)> {
    balanced_with(way, balance, endpoints, "")
}

/// The same, its upstream with one more key.
fn balanced_with(
    way: Way,
    balance: &str,
    endpoints: &[(&Address, u16)],
    more: &str,
) -> Result<(Ambassador, Address)> {
    let endpoints: Vec<_> =
        endpoints.iter().map(|(address, weight)| format!("'{address}:{weight}'")).collect();
    let here = Place::here();
    launch_balanced(way.launch(&here)?, &here, balance, &endpoints.join(", "), more)
}

fn place_balanced(
    place: &Place,
    balance: &str,
    endpoints: &str,
    more: &str,
) -> Result<(Ambassador, Address)> {
    launch_balanced(Launch::new(place)?, place, balance, endpoints, more)
}

fn launch_balanced(
    launch: Launch,
    place: &Place,
    balance: &str,
    endpoints: &str,
    more: &str,
) -> Result<(Ambassador, Address)> {
    let route = Address::from(SocketAddr::from((Ipv4Addr::LOCALHOST, place.port()?)));
    let config = format!(
        "version: 1
routes:
  - {{ name: balanced, listen: '{route}', upstream: many }}
upstreams:
  many:
    endpoints: [{endpoints}]
    balance: {balance}
    {more}
"
    );
    Ok((launch.config(&config)?.start()?, route))
}

/// An ambassador in a pod whose DNS is in the upstream's place, with a route to [`NAME`].
fn named(pod: &Pod, port: u16) -> Result<(Ambassador, Address)> {
    let place = pod.inside.with_resolver(&Dnsmasq::resolv_conf(pod.upstream.ipv4))?;
    place_balanced(&place, "failover", &format!("'{NAME}:{port}'"), "dns: { max_ttl: 1s }")
}

/// Expects all connections that are open to be redirected where the way is `direct`, and none elsewhere.
fn are_direct_or_not(ambassador: &Ambassador, way: Way) -> Result<()> {
    let told = ambassador.connections()?;
    let as_it_is = told.iter().all(|it| (it["tier"] == "direct") == (way == Way::Direct));
    ensure!(as_it_is && !told.is_empty(), "{way}: carried by {told:?}");
    Ok(())
}

/// Holds this many connections, with what greeted each.
fn hold(route: &Address, connections: usize) -> Result<Vec<(String, Peer)>> {
    (0..connections).map(|_| greeted(route, 1)).collect()
}

fn tally(held: &[(String, Peer)]) -> BTreeMap<&str, usize> {
    let mut tally = BTreeMap::new();
    for (name, _) in held {
        *tally.entry(name.as_str()).or_default() += 1;
    }
    tally
}

/// An address of this machine that refuses.
fn dead() -> Result<Address> {
    Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, Place::here().port()?)).into())
}

fn listen(pod: &Pod, ip: IpAddr) -> Result<Listener> {
    let address = Address::from(SocketAddr::new(ip, pod.upstream.port()?));
    pod.upstream.enter(|| address.listen())
}

/// Servers on two addresses of the upstream's place, on the same port, that say "o" and "n".
fn two_addresses(pod: &Pod) -> Result<(Echo, Echo)> {
    let more = Ipv4Addr::new(10, 77, 0, 3);
    let add = format!("{more}/24");
    let mut command = pod.upstream.command("ip");
    run(command.args(["addr", "add", &add, "dev", "eth0"]), SOON)?;
    let old = listen(pod, pod.upstream.ipv4.into())?;
    let new = Address::from(SocketAddr::from((more, old.address().port()?)));
    let new = pod.upstream.enter(|| new.listen())?;
    Ok((Echo::on(old, "o"), Echo::on(new, "n")))
}

fn until_reaches(ambassador: &Ambassador, pod: &Pod, route: &Address, name: &str) -> Result<()> {
    until_true(&format!("a connection to {name:?}"), || {
        let greeted = pod.inside.enter(|| greeted(route, 1));
        Ok(greeted.is_ok_and(|(heard, _)| heard == name))
    })
    .with_context(|| format!("follow a name; the log was: {}", ambassador.process.stderr()))
}

//! Endpoints that neither accept nor refuse: apps lose little time by them, then none; on each tier but
//! `copy`, which connects as `splice` does.

use std::time::{Duration, Instant};

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::peer::{Listener, Peer};
use ambassador_tests::place::{FIRST_SYN, Place};
use ambassador_tests::pod;
use ambassador_tests::pod::Pod;
use ambassador_tests::wait::until_true;
use ambassador_tests::way::Way;
use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};

use crate::ejection::{endpoints_of, until_is};
use crate::{launch_balanced, listen};

/// So long an attempt of a relay waits for an answer.
const TIMEOUT: Duration = Duration::from_millis(400);
const QUICK: &str = "connect: { timeout: 400ms }
    eject: { consecutive_failures: 2, for: 500ms }";
/// So long an app waits: less than it takes the kernel to suspect an address by itself.
const PATIENCE: Duration = Duration::from_millis(900);

#[test]
fn a_full_accept_queue_costs_little_and_is_left_alone_until_there_is_room() -> Result<()> {
    for way in ways()? {
        let here = Place::here();
        let (silent, second) = (Listener::new(Family::Tcp)?, Echo::greeting("2")?);
        let address = silent.address().clone();
        silent.socket().listen(0).context("make the accept queue short")?;
        let waiting = fill(&address)?;
        let endpoints = [&address, second.address()];
        let (ambassador, route) = failing_over(way, &here, endpoints, QUICK)?;
        is_passed_over(way, &ambassador, &here, &route, &address)
            .with_context(|| format!("{way}"))?;
        silent.socket().listen(4096).context("make the accept queue long")?;
        let _first = Echo::on(silent, "1");
        drop(waiting);
        until_is(&ambassador, &address, true).with_context(|| format!("{way}"))?;
        until_true("a return", || Ok(greeted(&route, 1)?.0 == "1"))?;
    }
    Ok(())
}

#[test]
fn a_blackholed_endpoint_costs_little_and_is_left_alone_until_it_answers() -> Result<()> {
    for way in ways()? {
        let pod = pod!("nft");
        let (first, second) = two_servers(&pod)?;
        let address = first.address().clone();
        pod.upstream.blackhole(&format!("tcp dport {}", address.port()?))?;
        let endpoints = [&address, second.address()];
        let (ambassador, route) = failing_over(way, &pod.inside, endpoints, QUICK)?;
        is_passed_over(way, &ambassador, &pod.inside, &route, &address)
            .with_context(|| format!("{way}"))?;
        pod.upstream.filter("flush ruleset")?;
        until_is(&ambassador, &address, true).with_context(|| format!("{way}"))?;
        until_true("a return", || Ok(pod.inside.enter(|| greeted(&route, 1))?.0 == "1"))?;
    }
    Ok(())
}

#[test]
fn a_handshake_that_takes_a_second_is_no_failure() -> Result<()> {
    for way in ways()? {
        let pod = pod!("nft");
        let (first, second) = two_servers(&pod)?;
        let address = first.address().clone();
        pod.upstream.blackhole(&format!("tcp dport {} {FIRST_SYN}", address.port()?))?;
        let endpoints = [&address, second.address()];
        let strict = "eject: { consecutive_failures: 1, for: 1m }";
        let (ambassador, route) = failing_over(way, &pod.inside, endpoints, strict)?;
        let began = Instant::now();
        let (who, _client) = pod.inside.enter(|| greeted(&route, 1))?;
        ensure!(who == "1", "{way}: {who}");
        ensure!(began.elapsed() > Duration::from_millis(800), "{way}: {:?}", began.elapsed());
        let told = &endpoints_of(&ambassador)?[0];
        ensure!(told["healthy"] == true && told["ejections"] == 0, "{way}: {told}");
    }
    Ok(())
}

/// All ways but one, for tests that take long: `copy` connects as `splice` does.
pub(crate) fn ways() -> Result<Vec<Way>> {
    Ok(Way::proxied()?.into_iter().filter(|way| *way != Way::Copy).collect())
}

/// Expects that an app that tries again reaches the second endpoint, at the cost that is documented, and that
/// the first one costs nothing from its ejection on.
fn is_passed_over(
    way: Way,
    ambassador: &Ambassador,
    place: &Place,
    route: &Address,
    silent: &Address,
) -> Result<()> {
    let began = Instant::now();
    let outcomes: Vec<_> = (0..2).map(|_| hurried(place, route)).collect();
    // On `direct` one app finds out, with its own patience; elsewhere an attempt does.
    let in_vain = outcomes.iter().take_while(|it| it.is_err()).count();
    ensure!(in_vain == usize::from(way == Way::Direct), "{outcomes:?}");
    // Their clocks need not be ours to the millisecond.
    ensure!(
        began.elapsed() >= TIMEOUT * 9 / 10,
        "the silent one was not met: {:?}",
        began.elapsed()
    );
    ensure!(outcomes.iter().flatten().all(|who| who == b"2"), "{outcomes:?}");
    until_is(ambassador, silent, false)?;
    for _ in 0..5 {
        let began = Instant::now();
        ensure!(hurried(place, route)? == b"2");
        ensure!(began.elapsed() < TIMEOUT, "it still costs {:?}", began.elapsed());
    }
    Ok(())
}

/// Connects as an app does that soon gives up, and says who greeted.
fn hurried(place: &Place, route: &Address) -> Result<Vec<u8>> {
    let socket = place.enter(|| Ok(Socket::new(Domain::IPV4, Type::STREAM, None)?))?;
    socket.connect_timeout(&route.tcp()?.into(), PATIENCE).context("connect")?;
    Peer::of(socket)?.hear(1)
}

/// Connects until nobody gets in any more.
fn fill(address: &Address) -> Result<Vec<Socket>> {
    let mut waiting = Vec::new();
    until_true("a full accept queue", || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        let got_in = socket.connect_timeout(&address.tcp()?.into(), TIMEOUT).is_ok();
        waiting.push(socket);
        Ok(!got_in)
    })?;
    Ok(waiting)
}

fn failing_over(
    way: Way,
    place: &Place,
    endpoints: [&Address; 2],
    more: &str,
) -> Result<(Ambassador, Address)> {
    let endpoints = endpoints.map(|it| format!("'{it}'")).join(", ");
    launch_balanced(way.launch(place)?, place, "failover", &endpoints, more)
}

fn two_servers(pod: &Pod) -> Result<(Echo, Echo)> {
    let server =
        |name| Ok::<_, anyhow::Error>(Echo::on(listen(pod, pod.upstream.ipv4.into())?, name));
    Ok((server("1")?, server("2")?))
}

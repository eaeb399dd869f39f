//! The tier `direct`: whose connections it takes, where they lead, and what is told of them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::{Ambassador, Launch};
use ambassador_tests::echo::greeted;
use ambassador_tests::peer::Peer;
use ambassador_tests::place::Place;
use ambassador_tests::wait::{SOON, until};

mod endpoints;
mod limits;
mod records;
mod redirection;
mod service;

/// The name of the route that most tests have.
const ROUTE: &str = "routed";

/// An ambassador in a place, all of whose routes are direct.
fn start(place: &Place, route: &Address, upstream: &Address) -> Result<Ambassador> {
    let launch = Launch::new(&place.with_bpffs()?)?.in_kernel("direct")?;
    launch.route(format!("{ROUTE}:{route}={upstream}")).start()
}

/// The same here, with a configuration: more about the route, and its upstream.
fn start_with(place: &Place, about_route: &str, upstream: &str) -> Result<(Ambassador, Address)> {
    let route = loopback(place)?;
    let config = format!(
        "version: 1
routes:
  - {{ name: {ROUTE}, listen: '{route}', upstream: up, {about_route} }}
upstreams:
  up: {{ {upstream} }}
"
    );
    let launch = Launch::new(&place.with_bpffs()?)?.in_kernel("direct")?;
    Ok((launch.config(&config)?.start()?, route))
}

/// An address on the loopback of a place that nobody uses.
fn loopback(place: &Place) -> Result<Address> {
    Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, place.port()?)).into())
}

/// Connects as an app does that chooses where it comes from, which the kernel tiers leave alone.
fn connect_bound(to: &Address) -> Result<Peer> {
    let to = to.tcp()?;
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.bind(&SocketAddr::new(to.ip(), 0).into()).context("bind a source")?;
    socket.connect(&to.into()).with_context(|| format!("connect to {to}"))?;
    Peer::of(socket)
}

/// The only connection there is now, as `connections` tells it, once there is one alone.
fn the_connection(ambassador: &Ambassador) -> Result<Value> {
    until("one connection", SOON, || {
        let all = ambassador.connections()?;
        Ok(if let [one] = &all[..] { Some(one.clone()) } else { None })
    })
}

/// Which tier carries this client's connection.
fn tier_of(ambassador: &Ambassador, client: &Peer) -> Result<String> {
    let local = client.socket().local_addr()?.as_socket().context("find the client's address")?;
    let local = SocketAddr::new(local.ip().to_canonical(), local.port()).to_string();
    until(&format!("the connection of {local}"), SOON, || {
        let all = ambassador.connections()?;
        let ours = all.iter().find(|it| it["peer"] == *local);
        Ok(ours.map(|it| it["tier"].as_str().unwrap_or_default().to_owned()))
    })
}

/// Expects that the hooks took this client's connection; if not, says what they left to the listeners.
fn is_direct(ambassador: &Ambassador, client: &Peer) -> Result<()> {
    let tier = tier_of(ambassador, client)?;
    let explained = || ambassador.command(&["explain", ROUTE]).map(|explained| explained.stdout);
    ensure!(tier == "direct", "it is carried by {tier}; {}", explained()?);
    Ok(())
}

/// Holds this many connections, with what greeted each.
fn hold(route: &Address, connections: usize) -> Result<Vec<(String, Peer)>> {
    (0..connections).map(|_| greeted(route, 1)).collect()
}

/// How many of these connections each greeting has.
fn tally(held: &[(String, Peer)]) -> std::collections::BTreeMap<&str, usize> {
    let mut tally = std::collections::BTreeMap::new();
    for (name, _) in held {
        *tally.entry(name.as_str()).or_default() += 1;
    }
    tally
}

/// Expects that all of these took the tier, not the listener.
fn all_are_direct(ambassador: &Ambassador, held: &[(String, Peer)]) -> Result<()> {
    let told = ambassador.connections()?;
    for (_, client) in held {
        let local = client.socket().local_addr()?.as_socket().context("find an address")?;
        let tier = told.iter().find(|it| it["peer"] == *local.to_string()).map(|it| &it["tier"]);
        ensure!(tier.is_some_and(|tier| tier == "direct"), "{local} is carried by {tier:?}");
    }
    Ok(())
}

/// A listener in a place.
fn listen(place: &Place, ip: impl Into<IpAddr>) -> Result<ambassador_tests::peer::Listener> {
    let address = Address::from(SocketAddr::new(ip.into(), place.port()?));
    place.enter(|| address.listen())
}

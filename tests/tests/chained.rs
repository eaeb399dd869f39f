//! Two ambassadors for the same apps, where the one leads to an address that the other listens on: whoever
//! takes a connection on, and whichever began first, every byte and both ends of the stream arrive.

use std::net::{Ipv4Addr, SocketAddr};
use std::thread::scope;

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador::{Ambassador, Launch};
use ambassador_tests::needs;
use ambassador_tests::noise::Noise;
use ambassador_tests::peer::{Listener, Peer};
use ambassador_tests::place::Place;
use ambassador_tests::way::Way;
use anyhow::{Context, Result, ensure};

const LENGTH: usize = 8 << 20;

#[test]
fn direct_behind_direct() -> Result<()> {
    needs!(Direct);
    carries_all(Way::Direct, Way::Direct)
}

#[test]
fn sockmap_behind_sockmap() -> Result<()> {
    needs!(Sockmap);
    carries_all(Way::Sockmap, Way::Sockmap)
}

#[test]
fn sockmap_behind_direct() -> Result<()> {
    needs!(Sockmap);
    carries_all(Way::Direct, Way::Sockmap)
}

#[test]
fn direct_behind_sockmap() -> Result<()> {
    needs!(Sockmap);
    carries_all(Way::Sockmap, Way::Direct)
}

/// From an app to the first of two ambassadors, to the second, to a server; whichever has begun before.
fn carries_all(first_is: Way, second_is: Way) -> Result<()> {
    let place = Place::here().with_bpffs()?;
    let server = Listener::new(Family::Tcp)?;
    let address = || Ok::<_, anyhow::Error>(SocketAddr::from((Ipv4Addr::LOCALHOST, place.port()?)));
    let (app_side, between) = (address()?, address()?);
    let launch = |name: &str, way: Way, route: String| {
        Launch::new(&place)?.in_kernel(way)?.flag("--instance", name).route(route).start()
    };
    let first = || launch("first", first_is, format!("road:{app_side}={between}"));
    let second = || launch("second", second_is, format!("road:{between}={}", server.address()));
    let running = [first()?, second()?];
    let named = carries(&app_side.into(), &server).context("the first began before")?;
    // Each hook replaces what the one before it has shown.
    let last = if (first_is, second_is) == (Way::Direct, Way::Direct) { between } else { app_side };
    ensure!(named == last, "the app sees {named} where {last} should be");
    // What is pinned would keep its place in the order.
    running.into_iter().try_for_each(Ambassador::end)?;
    let _running = [second()?, first()?];
    let named = carries(&app_side.into(), &server).context("the second began before")?;
    ensure!(named == app_side, "the app sees {named} where {app_side} should be");
    Ok(())
}

/// Returns who the app sees at the other end.
fn carries(app_side: &Address, listener: &Listener) -> Result<SocketAddr> {
    let client = app_side.connect()?;
    client.socket().set_nonblocking(true).context("make a client non-blocking")?;
    let server = listener.accept()?;
    server.say(b"first")?;
    ensure!(client.hear(5)? == b"first");
    let named = client.socket().peer_addr()?.as_socket().context("name the other end")?;
    passes(&client, &server, 1)?;
    passes(&server, &client, 2)?;
    client.finish()?;
    server.hear_end()?;
    passes(&server, &client, 3)?;
    server.finish()?;
    client.hear_end()?;
    Ok(named)
}

fn passes(from: &Peer, to: &Peer, seed: u64) -> Result<()> {
    scope(|scope| {
        let sending = scope.spawn(|| from.say_noise(&mut Noise::new(seed), LENGTH));
        to.hear_noise(&mut Noise::new(seed), LENGTH)?;
        sending.join().expect("the sender does not panic")
    })
}

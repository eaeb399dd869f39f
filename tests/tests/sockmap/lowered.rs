//! Routes that were carried by `sockmap` and are no more: by an order, or because another ambassador came.
//! Their clients are to have ordinary sockets.

use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, SocketAddr};

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador::Launch;
use ambassador_tests::installed;
use ambassador_tests::needs;
use ambassador_tests::noise::Noise;
use ambassador_tests::peer::{Listener, Peer};
use ambassador_tests::place::{BPFFS, Place};
use ambassador_tests::process::run;
use ambassador_tests::wait::{SOON, until_true};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::waiting;

const INSTANCE: &str = "lowered";

#[test]
fn client_enrolled_just_before_its_route_is_lowered_gets_an_ordinary_socket_back() -> Result<()> {
    needs!(Sockmap);
    installed!("bpftool");
    let scene = Scene::new()?;
    let ambassador = scene.launch("sockmap")?.start()?;
    let enrol_again = scene.enrolment()?;
    ambassador.command(&["tier", "road", "splice"])?.success()?;
    // As the kernel is for a client that connects before the order, and is accepted after it.
    run(scene.place.command("bpftool").args(&enrol_again), SOON)?;
    scene.client_is_ordinary()
}

#[test]
fn client_whose_route_is_lowered_while_its_upstream_is_being_reached_is_relayed() -> Result<()> {
    needs!(Sockmap);
    let place = Place::here().with_bpffs()?;
    // With room for one that waits to be accepted: a second has to knock again.
    let full = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    full.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).context("bind a server")?;
    full.listen(0).context("listen with no room")?;
    let upstream = full.local_addr()?.as_socket().context("find an address")?;
    let _waits = Address::from(upstream).connect()?;
    let scene = Scene::to(place, upstream.into())?;
    let ambassador = scene.launch("sockmap")?.start()?;
    let client = scene.route.connect()?;
    let connecting = || Ok(ambassador.command(&["connections"])?.success()?.contains("road"));
    until_true("the client to be accepted", connecting)?;
    ambassador.command(&["tier", "road", "splice"])?.success()?;
    let _waited = full.accept().context("make room")?;
    let server = Peer::of(full.accept().context("accept the ambassador")?.0)?;

    client.socket().set_nonblocking(true).context("make a client non-blocking")?;
    let taken = client.say_until_held_back(&mut Noise::new(1))?;
    let in_flight = ambassador.metrics()?.sum("ambassador_inflight_bytes", &[("route", "road")]);
    ensure!(in_flight == Some(0.0), "{in_flight:?} bytes took a shortcut that was switched off");
    server.hear_noise(&mut Noise::new(1), taken)
}

#[test]
fn clients_of_a_killed_ambassador_s_listener_are_ordinary_for_the_next_one() -> Result<()> {
    needs!(Sockmap);
    let scene = Scene::new()?;
    drop(scene.launch("sockmap")?.start()?);
    let _next = scene.launch("splice")?.start()?;
    scene.client_is_ordinary()
}

/// What a killed ambassador left in force ends with its tables.
#[test]
fn clients_of_whoever_took_a_dead_ambassador_s_port_are_ordinary_once_it_is_stale() -> Result<()> {
    needs!(Sockmap);
    let scene = Scene::new()?;
    drop(scene.launch("sockmap")?.flag("--stale-after", "10s").start()?);
    let other = scene.route.listen().context("take the port of an ambassador that was killed")?;
    until_true("a client that is ordinary", || {
        let client = scene.route.connect()?;
        other.accept()?.say(b"reply")?;
        // The bytes have come, whether or not they are counted.
        client.socket().peek(&mut [MaybeUninit::uninit(); 5]).context("wait for the reply")?;
        Ok(waiting(&client)? == 5)
    })
}

/// A route, in a place with a bpffs of its own, to a server in the hands of the test.
struct Scene {
    place: Place,
    route: Address,
    server: Address,
    listener: Option<Listener>,
}

impl Scene {
    fn new() -> Result<Self> {
        let listener = Listener::new(Family::Tcp)?;
        let scene = Self::to(Place::here().with_bpffs()?, listener.address().clone())?;
        Ok(Self { listener: Some(listener), ..scene })
    }

    fn to(place: Place, server: Address) -> Result<Self> {
        let route = SocketAddr::from((Ipv4Addr::LOCALHOST, place.port()?)).into();
        Ok(Self { place, route, server, listener: None })
    }

    fn launch(&self, tier: &str) -> Result<Launch> {
        let launch = Launch::new(&self.place)?.in_kernel(tier)?.flag("--instance", INSTANCE);
        Ok(launch.route(format!("road:{}={}", self.route, self.server)))
    }

    /// What bpftool is to be told to have the route's clients enrolled.
    fn enrolment(&self) -> Result<Vec<String>> {
        let pin = format!("{BPFFS}/ambassador/{INSTANCE}/maps/ENROL_LISTENERS");
        let mut dump = self.place.command("bpftool");
        let dump = run(dump.args(["-j", "map", "dump", "pinned", &pin]), SOON)?;
        let dump: Value = serde_json::from_str(&dump).context("parse the listeners")?;
        let bytes = |part: &str| {
            let bytes = dump[0][part].as_array().context("find the route's listener")?;
            let bytes = bytes.iter().map(|byte| byte.as_str().map(str::to_owned));
            bytes.collect::<Option<Vec<_>>>().context("read a byte")
        };
        let words = ["map", "update", "pinned", &pin, "key"].map(str::to_owned);
        Ok([words.to_vec(), bytes("key")?, vec!["value".to_owned()], bytes("value")?].concat())
    }

    /// Expects of the next client that its waiting bytes are counted, which enrolled ones' are not.
    fn client_is_ordinary(&self) -> Result<()> {
        let client = self.route.connect()?;
        let server = self.listener.as_ref().context("find the server")?.accept()?;
        server.say(b"reply")?;
        until_true("the reply to be counted", || Ok(waiting(&client)? == 5))
    }
}

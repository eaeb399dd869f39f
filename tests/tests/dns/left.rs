//! Addresses that a name leaves: those that return are as they were, and where their connections are to end with
//! them they are looked after until then.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use anyhow::{Context, Result, ensure};

use ambassador_tests::needs;
use ambassador_tests::pod;
use ambassador_tests::pod::Pod;
use ambassador_tests::server::scripted_dns::ScriptedDns;
use ambassador_tests::wait::{SOON, until, until_true};
use ambassador_tests::way::Way;

use crate::{NAME, ONE, Scene, TWO, echo, endpoint};

/// What is said of the first host at an address.
fn health(scene: &Scene, address: &str) -> Result<Option<String>> {
    let status = scene.ambassador.status()?;
    let hosts = status["routes"][0]["endpoints"][0]["hosts"].as_array().cloned();
    let hosts = hosts.context("find the hosts")?;
    let of =
        hosts.iter().find(|it| it["address"].as_str().is_some_and(|it| it.starts_with(address)));
    Ok(of.and_then(|it| it["health"].as_str()).map(str::to_owned))
}

/// A name of two addresses, of which the first does not work and is out for so long.
fn half_out(pod: Pod, port: u16, lasting: &str) -> Result<Scene> {
    let upstream = format!(
        "{}, eject: {{ consecutive_failures: 2, for: {lasting} }}, balance: round_robin",
        endpoint(port)
    );
    let both = [ONE.into(), TWO.into()];
    let scene = Scene::with(
        pod,
        |dns| dns.knows(NAME, 0, &both),
        &upstream,
        "",
        |place| Way::Splice.launch(place),
    )?;
    until_true("an ejection", || {
        let _ = scene.greeting();
        Ok(health(&scene, "127.0.1.1")?.is_some_and(|it| it.starts_with("ejected")))
    })?;
    Ok(scene)
}

fn flaps(scene: &Scene, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
    scene.dns.knows(NAME, 0, &[TWO.into()])?;
    until_true("one address", || Ok(health(scene, "127.0.1.1")?.is_none()))?;
    meanwhile()?;
    scene.dns.knows(NAME, 0, &[ONE.into(), TWO.into()])
}

#[test]
fn an_address_that_is_out_stays_out_when_its_name_returns_to_it() -> Result<()> {
    let pod = pod!();
    let port = pod.inside.port()?;
    let _echo = echo(&pod, TWO, port, "2")?;
    let scene = half_out(pod, port, "5m")?;
    flaps(&scene, || Ok(()))?;
    until_true("both addresses", || Ok(scene.known()? == "127.0.1.1 127.0.1.2"))?;
    let health = health(&scene, "127.0.1.1")?.context("find the address")?;
    ensure!(health.starts_with("ejected"), "{health}");
    Ok(())
}

#[test]
fn an_address_whose_time_passed_while_it_was_away_is_soon_back() -> Result<()> {
    let pod = pod!();
    let port = pod.inside.port()?;
    let _echo = echo(&pod, TWO, port, "2")?;
    let mut back = None;
    let scene = half_out(pod, port, "300ms")?;
    flaps(&scene, || {
        // So long that nobody tries it any more.
        scene.is_asked(NAME, 12)?;
        back = Some(echo(&scene.pod, ONE, port, "1")?);
        Ok(())
    })?;
    scene.reaches("1")
}

#[test]
fn the_last_address_of_a_name_is_not_out() -> Result<()> {
    let pod = pod!();
    let port = pod.inside.port()?;
    let _echo = echo(&pod, TWO, port, "2")?;
    let scene = half_out(pod, port, "1h")?;
    scene.dns.knows(NAME, 0, &[ONE.into()])?;
    until_true("its return", || {
        let now = health(&scene, "127.0.1.1")?;
        Ok(scene.known()? == "127.0.1.1" && now.is_some_and(|it| it == "healthy"))
    })
}

#[test]
fn an_address_that_was_out_by_rules_that_are_gone_returns_as_good() -> Result<()> {
    let pod = pod!();
    let port = pod.inside.port()?;
    let _echo = echo(&pod, TWO, port, "2")?;
    let scene = half_out(pod, port, "1h")?;
    flaps(&scene, || {
        let before = std::fs::read_to_string(scene.ambassador.configuration())?;
        let after = before.replace("eject: { consecutive_failures: 2, for: 1h }", "eject: none");
        ensure!(after != before);
        scene.ambassador.reconfigure(&after)?.success().map(drop)
    })?;
    until_true("both addresses", || Ok(scene.known()? == "127.0.1.1 127.0.1.2"))?;
    let health = health(&scene, "127.0.1.1")?.context("find the address")?;
    ensure!(health == "healthy", "{health}");
    Ok(())
}

/// A connection to an address that its name has left lives while a server is there, and no longer.
fn ends_with_its_server(rules: &str, way: Way) -> Result<()> {
    let pod = pod!();
    let port = pod.inside.port()?;
    let _echo = echo(&pod, TWO, port, "2")?;
    let server = pod.inside.enter(|| Ok(TcpListener::bind((ONE, port))?))?;
    let upstream = format!("{}, on_unhealthy: close, {rules}", endpoint(port));
    let script = |dns: &ScriptedDns| dns.knows(NAME, 0, &[ONE.into()]);
    let scene = Scene::with(pod, script, &upstream, "", |place| way.launch(place))?;
    until_true("an address", || Ok(scene.known()? == "127.0.1.1"))?;
    let to = scene.route.to_string();
    let mut app = scene.pod.inside.enter(|| Ok(TcpStream::connect(&to)?))?;
    app.set_read_timeout(Some(SOON))?;
    app.write_all(b"!")?;
    server.set_nonblocking(true)?;
    let mut conversation = until("the connection", SOON, || {
        // Checks come here, too, and say nothing.
        let stream = server.accept().ok().map(|(stream, _)| stream);
        Ok(stream.filter(|mut stream| stream.read(&mut [0]).is_ok_and(|read| read == 1)))
    })?;
    scene.dns.knows(NAME, 0, &[TWO.into()])?;
    until_true("the other address", || Ok(scene.known()? == "127.0.1.2"))?;
    // Somebody looks whether it is still there.
    while server.accept().is_ok() {}
    until_true("a look", || Ok(server.accept().is_ok()))?;
    conversation.write_all(b"?")?;
    app.read_exact(&mut [0])?;
    drop(server);
    let heard = app.read(&mut [0]);
    let waited = heard.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
    ensure!(heard.is_err() && !waited, "{heard:?}");
    until_true("the record", || {
        Ok(!scene.ambassador.access_records("outcome", "host_lost")?.is_empty())
    })
}

const EJECTED: &str = "eject: { consecutive_failures: 2, for: 5s }";
const CHECKED: &str = "eject: none, health: { check: tcp, interval: 200ms }";

#[test]
fn a_connection_to_where_its_name_was_ends_with_its_server() -> Result<()> {
    for rules in [EJECTED, CHECKED] {
        ends_with_its_server(rules, Way::Splice).with_context(|| rules)?;
    }
    Ok(())
}

#[test]
fn the_same_is_so_of_one_that_the_kernel_made() -> Result<()> {
    needs!(Direct);
    for rules in [EJECTED, CHECKED] {
        ends_with_its_server(rules, Way::Direct).with_context(|| rules)?;
    }
    Ok(())
}

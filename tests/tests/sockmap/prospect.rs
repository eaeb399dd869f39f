//! Connections that have no shortcut yet: they get one with the second piece that they send.

use std::io::Write;
use std::net::TcpStream;
use std::time::Instant;

use ambassador::datapath::obstacle;
use ambassador::datapath::sockmap::Enrol;
use ambassador_tests::address::Family;
use ambassador_tests::peer::Peer;
use ambassador_tests::wait::until_true;
use ambassador_tests::way::{Way, Wire};
use ambassador_tests::{needs, skip};
use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};

use crate::tier::Tier;
use crate::{BYTES, limits, waiting};

#[test]
fn connection_of_a_single_request_is_relayed() -> Result<()> {
    needs!(Sockmap);
    let wire = Wire::new(Way::Sockmap, Family::Tcp)?;
    let (client, server) = wire.pair()?;
    ask(&client, &server, 1)?;
    drop((client, server));
    recorded(&wire, "splice", 5)
}

#[test]
fn connection_that_goes_on_has_a_shortcut() -> Result<()> {
    needs!(Sockmap);
    let wire = Wire::new(Way::Sockmap, Family::Tcp)?;
    let (client, server) = wire.pair()?;
    ask(&client, &server, 9)?;
    drop((client, server));
    recorded(&wire, "sockmap", 45)
}

#[test]
fn order_to_relay_is_obeyed_by_a_connection_that_has_no_shortcut_yet() -> Result<()> {
    needs!(Sockmap);
    let wire = Wire::new(Way::Sockmap, Family::Tcp)?;
    let ambassador = wire.road.ambassador.as_ref().context("find the ambassador")?;
    let (client, server) = wire.pair()?;
    ask(&client, &server, 1)?;
    ambassador.command(&["tier", "road", "splice"])?.success()?;
    ask(&client, &server, 3)?;
    // In a sockmap, waiting bytes are not counted.
    server.say(b"reply")?;
    until_true("the reply to be counted", || Ok(waiting(&client)? == 5))?;
    drop((client, server));
    recorded(&wire, "splice", 20)
}

#[test]
fn client_that_has_turned_blocking_gets_an_ordinary_socket_back_with_its_first_bytes() -> Result<()>
{
    needs!(Vouched);
    let wire = Wire::new(Way::Vouched, Family::Tcp)?;
    let client = Socket::new(Domain::IPV4, Type::STREAM, None).context("make a client")?;
    client.set_nonblocking(true)?;
    match client.connect(&wire.road.address.tcp()?.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        other => other.context("connect a client")?,
    }
    let (client, server) = (Peer::of(client)?, wire.listener.accept()?);
    client.socket().set_nonblocking(false).context("make a client blocking")?;
    ask(&client, &server, 1)?;
    server.say(b"reply")?;
    until_true("the reply to be counted", || Ok(waiting(&client)? == 5))?;
    drop((client, server));
    recorded(&wire, "splice", 5)
}

/// Enrolling one that comes to nothing costs more than it brings.
#[test]
fn storm_of_clients_that_say_nothing_is_enrolled_in_part() -> Result<()> {
    let tier = tier!(Enrol::Anybody);
    let begun = Instant::now();
    let enrolled = storm(&tier, b"")?;
    let most = 1024 + begun.elapsed().as_millis() / 2;
    ensure!(enrolled >= 1024 && enrolled as u128 <= most, "{enrolled} of {STORM}, expected {most}");
    Ok(())
}

#[test]
fn storm_of_clients_that_go_on_is_enrolled() -> Result<()> {
    let tier = tier!(Enrol::Anybody);
    let enrolled = storm(&tier, b"twice")?;
    ensure!(enrolled == STORM, "only {enrolled} of {STORM}");
    Ok(())
}

/// Or the next one from its port would be taken for it.
#[test]
fn client_that_comes_to_nothing_is_forgotten() -> Result<()> {
    let tier = tier!(Enrol::Anybody);
    let _client = TcpStream::connect(tier.listener.local_addr()?).context("connect")?;
    let (accepted, _) = tier.listener.accept().context("accept a client")?;
    ensure!(tier.ends_enrolment(&accepted), "it was not enrolled");
    ensure!(!tier.ends_enrolment(&accepted), "it still is");
    Ok(())
}

const STORM: usize = 4000;

/// Connects one client after the other, each of which says something twice; tells how many were enrolled.
fn storm(tier: &Tier, word: &[u8]) -> Result<usize> {
    let mut enrolled = 0;
    for _ in 0..STORM {
        let mut client = TcpStream::connect(tier.listener.local_addr()?).context("connect")?;
        let (accepted, _) = tier.listener.accept().context("accept a client")?;
        client.write_all(word).context("speak")?;
        client.write_all(word).context("go on")?;
        enrolled += usize::from(tier.ends_enrolment(&accepted));
    }
    Ok(enrolled)
}

/// Questions and answers of five bytes each.
pub(crate) fn ask(client: &Peer, server: &Peer, times: usize) -> Result<()> {
    for _ in 0..times {
        client.say(b"hello")?;
        ensure!(server.hear(5)? == b"hello");
        server.say(b"there")?;
        ensure!(client.hear(5)? == b"there");
    }
    Ok(())
}

/// Expects the connection's record.
fn recorded(wire: &Wire, tier: &str, bytes_up: u64) -> Result<()> {
    let ambassador = wire.road.ambassador.as_ref().context("find the ambassador")?;
    until_true("the record of the connection", || {
        let records = ambassador.access_records("tier", tier)?;
        Ok(records.iter().any(|record| record["bytes_up"] == bytes_up))
    })
}

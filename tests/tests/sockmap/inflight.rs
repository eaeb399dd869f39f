//! What a connection may have under way in the kernel is told, and bounded as configured; what goes the native way
//! meanwhile is little.

use std::os::fd::AsRawFd;

use ambassador_tests::address::Family;
use ambassador_tests::needs;
use ambassador_tests::noise::Noise;
use ambassador_tests::peer::Peer;
use ambassador_tests::wait::until_true;
use ambassador_tests::way::{Way, Wire};
use anyhow::{Context, Result, ensure};

use crate::BYTES;
use crate::prospect::ask;

/// What the kernel half has the socket of an enrolled client hold (`enrol.rs`).
const BACKLOG: u32 = 64 * 1024 - 3;
/// Questions and answers after which a client has a shortcut, and the relay owes it nothing.
const UNTIL_SHORTCUT: usize = 9;
/// More than is said in one go.
const PIECE: u32 = 512 * 1024;

#[test]
fn bytes_in_flight_are_a_metric() -> Result<()> {
    needs!(Sockmap);
    let wire = Wire::new(Way::Sockmap, Family::Tcp)?;
    let ambassador = wire.road.ambassador.as_ref().context("find the ambassador")?;
    let in_flight = || {
        let bytes = ambassador.metrics()?.sum("ambassador_inflight_bytes", &[("route", "road")]);
        bytes.context("find the metric")
    };
    ensure!(in_flight()? == 0.0, "something is in flight without a connection");
    let (client, server) = wire.pair()?;
    let taken = client.say_until_held_back(&mut Noise::new(10))?;
    let stalled = in_flight()?;
    ensure!(stalled > 0.0 && stalled <= f64::from(BYTES), "{stalled} bytes are in flight");
    server.hear_noise(&mut Noise::new(10), taken)?;
    until_true("nothing to be in flight", || Ok(in_flight()? == 0.0))?;
    // What is in flight when a connection ends is nobody's any more.
    client.say_until_held_back(&mut Noise::new(11))?;
    ensure!(in_flight()? > 0.0);
    client.reset()?;
    until_true("nothing to be in flight", || Ok(in_flight()? == 0.0))
}

/// The kernel half reads the bound where the metric does; that it obeys is shown by those above.
#[test]
fn bytes_in_flight_are_bounded_as_configured() -> Result<()> {
    needs!(Sockmap);
    const LEAST: f64 = 65_536.0;
    let configured = stalls_with(&[("--inflight-bytes", "65536")])?;
    ensure!(configured > 0.0 && configured <= LEAST, "{configured} bytes are in flight");
    let unconfigured = stalls_with(&[])?;
    ensure!(unconfigured > LEAST, "{unconfigured} bytes are in flight where more may be");
    Ok(())
}

/// What has taken the native way must be forwarded before anything takes the shortcut again, so it must not be much.
#[test]
fn app_that_is_held_back_has_little_in_its_own_socket() -> Result<()> {
    needs!(Sockmap);
    let wire = Wire::with(Way::Sockmap, &[])?;
    let owns = [64 * 1024, 256 * 1024].map(|own| (Some(own), own));
    for (own, limit) in [(None, BACKLOG)].into_iter().chain(owns) {
        let (client, server) = wire.pair()?;
        if let Some(own) = own {
            client.socket().set_tcp_notsent_lowat(own).context("set a limit")?;
        }
        ask(&client, &server, UNTIL_SHORTCUT)?;
        let taken = client.say_until_held_back(&mut Noise::new(14))?;
        let unsent = unsent(&client)?;
        // The piece that has met the limit may be of any size.
        ensure!(unsent > 0 && unsent < limit + PIECE, "{unsent} bytes, and the limit is {limit}");
        let told = client.socket().tcp_notsent_lowat().context("ask for the limit")?;
        ensure!(told == limit, "the limit is {told}, not {limit}");
        server.hear_noise(&mut Noise::new(14), taken)?;
    }
    Ok(())
}

/// Bytes of a client that have not arrived anywhere.
fn unsent(client: &Peer) -> Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, by its older name, writes an int.
    let failed =
        unsafe { libc::ioctl(client.socket().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    ensure!(failed == 0, "count bytes: {}", std::io::Error::last_os_error());
    bytes.try_into().context("count bytes")
}

/// How many bytes are in flight to a server that does not read, through an ambassador with these flags.
fn stalls_with(flags: &[(&str, &str)]) -> Result<f64> {
    let wire = Wire::with(Way::Sockmap, flags)?;
    let ambassador = wire.road.ambassador.as_ref().context("find the ambassador")?;
    let (client, server) = wire.pair()?;
    ask(&client, &server, UNTIL_SHORTCUT)?;
    client.say_until_held_back(&mut Noise::new(13))?;
    let bytes = ambassador.metrics()?.sum("ambassador_inflight_bytes", &[("route", "road")]);
    bytes.context("find the metric")
}

//! What the hot paths of the user half cost, in instructions: held against `tests/cost.json`, so that a change
//! which makes them longer is seen. Unlike time, instructions do not depend on what else a machine does.
//!
//! Only the release binary counts, which `cargo xtask test` hands over. Where a longer path is meant, the
//! failure says the figure to put into the file.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;

use ambassador_tests::ambassador::{BINARY, Launch};
use ambassador_tests::place::Place;
use ambassador_tests::wait::{SOON, until};
use ambassador_tests::{installed, skip};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A part of the cost that is noise: probes of readiness, and how work falls into wake-ups.
const TOLERANCE: f64 = 0.06;
const MESSAGE: [u8; 64] = [b'x'; 64];

/// Ends the calling test where its means are not there.
macro_rules! needs_valgrind {
    () => {
        if std::env::var_os(BINARY).is_none() {
            skip!("it is about the release binary, which `cargo xtask test` builds");
        }
        installed!("valgrind");
    };
}

#[test]
fn round_trip_costs_no_more_than_it_did() -> Result<()> {
    needs_valgrind!();
    as_before("a round trip of 64 bytes", |address, times| {
        let mut client = connect(address)?;
        (0..times).try_for_each(|_| round_trip(&mut client))
    })
}

#[test]
fn connection_costs_no_more_than_it_did() -> Result<()> {
    needs_valgrind!();
    as_before("a connection of one round trip", |address, times| {
        (0..times).try_for_each(|_| round_trip(&mut connect(address)?))
    })
}

/// Does something so many times at a route to an echo, and compares what one time costs.
fn as_before(what: &str, act: fn(SocketAddr, u64) -> Result<()>) -> Result<()> {
    const FEW: u64 = 1000;
    const MANY: u64 = 5000;
    // What is not part of it costs the same in both.
    let (few, many) = (instructions(FEW, act)?, instructions(MANY, act)?);
    let cost = many.saturating_sub(few) as f64 / (MANY - FEW) as f64;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cost.json");
    let baseline = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    let baseline: Value = serde_json::from_slice(&baseline).context("parse the baseline")?;
    let before = baseline["user half"][what].as_f64().with_context(|| format!("find {what}"))?;
    println!("{what}: {cost:.0} instructions, {before} before");
    ensure!(
        cost <= before * (1.0 + TOLERANCE),
        "{what} costs {cost:.0} instructions, before it was {before}; if that is meant, say so in {}",
        path.display()
    );
    Ok(())
}

/// What an ambassador executes in user space from start to end, while something is done so many times.
fn instructions(times: u64, act: fn(SocketAddr, u64) -> Result<()>) -> Result<u64> {
    let place = Place::here();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen for an echo")?;
    let echo = listener.local_addr().context("read the echo's address")?;
    // It ends with the process, as does what it serves.
    thread::spawn(move || listener.incoming().flatten().for_each(serve));

    let route = SocketAddr::from((Ipv4Addr::LOCALHOST, place.port()?));
    let launch = Launch::new(&place)?.route(format!("{route}={echo}")).flag("--tier", "splice");
    let counts = launch.directory().join("counts");
    let to_file = format!("--callgrind-out-file={}", counts.display());
    let mut ambassador = launch.under(&["valgrind", "--tool=callgrind", &to_file]).start()?;
    act(route, times)?;
    // Of a signal, valgrind does not always tell.
    ambassador.command(&["shutdown"])?.success()?;
    until("the end of the ambassador", SOON, || ambassador.process.ended())
        .with_context(|| format!("its log was: {}", ambassador.process.stderr()))?;
    let counts = fs::read_to_string(&counts).context("read what valgrind has counted")?;
    let total = counts.lines().find_map(|line| line.strip_prefix("summary: "));
    total.context("find the sum of what valgrind has counted")?.trim().parse().context("parse it")
}

fn serve(mut client: TcpStream) {
    thread::spawn(move || {
        let mut message = MESSAGE;
        while client.read_exact(&mut message).and_then(|()| client.write_all(&message)).is_ok() {}
    });
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, SOON).context("connect")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SOON))?;
    Ok(stream)
}

fn round_trip(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(&MESSAGE).context("send a request")?;
    let mut reply = [0; MESSAGE.len()];
    stream.read_exact(&mut reply).context("receive a reply")?;
    ensure!(reply == MESSAGE, "the reply is another");
    Ok(())
}

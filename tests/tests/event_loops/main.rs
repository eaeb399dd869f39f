//! Event loops: many connections on one thread, with sockets that never block, as Python, Node and Go
//! drive them.

mod edge_triggered;

use std::time::Duration;

use anyhow::{Context, Result};

use ambassador_tests::address::{Address, Family};
use ambassador_tests::echo::Echo;
use ambassador_tests::installed;
use ambassador_tests::place::Place;
use ambassador_tests::process::run;
use ambassador_tests::way::{Bytes, Road, Way};

const CONNECTIONS: usize = 16;
/// More than `sockmap` lets one connection have under way, so that some take the native way.
const LENGTH: usize = 3_333_333;
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn asyncio_is_served() -> Result<()> {
    installed!("python3");
    served(|echo| program("python3", "asyncio_client.py", echo))
}

#[test]
fn node_is_served() -> Result<()> {
    installed!("node");
    served(|echo| program("node", "node_client.js", echo))
}

#[test]
fn edge_triggered_loop_is_served() -> Result<()> {
    served(|echo| edge_triggered::talk(echo, CONNECTIONS, LENGTH))
}

/// Expects that clients get back what they send, each all of it, on every way.
fn served(clients: impl Fn(&Address) -> Result<()>) -> Result<()> {
    let echo = Echo::new(Family::Tcp)?;
    for way in Way::all()? {
        let road = Road::to(echo.address(), way, &Place::here(), Family::Tcp)?;
        clients(&road.address).with_context(|| format!("by {way}"))?;
        let each_way = (CONNECTIONS * LENGTH) as u64;
        let bytes = Bytes { up: each_way, down: each_way };
        road.has_carried(CONNECTIONS as u64, Some(bytes))?;
    }
    Ok(())
}

fn program(interpreter: &str, file: &str, echo: &Address) -> Result<()> {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/event_loops");
    run(
        Place::here()
            .command(interpreter)
            .arg(format!("{directory}/{file}"))
            .args([echo.host()?, echo.port()?.to_string()])
            .args([CONNECTIONS.to_string(), LENGTH.to_string()]),
        PATIENCE,
    )
    .map(drop)
}

//! An ambassador in front of an echo: enough for a test that is not about the upstream.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Result;

use crate::address::{Address, Family};
use crate::ambassador::{Ambassador, Launch};
use crate::echo::Echo;
use crate::peer::Peer;
use crate::place::Place;

/// The name of the route that leads to the echo.
pub const ROUTE: &str = "front";

/// A running ambassador with one route, here on the machine's loopback.
#[derive(Debug)]
pub struct Front {
    /// The ambassador.
    pub ambassador: Ambassador,
    /// Where its route listens.
    pub address: Address,
    /// Where its route leads.
    pub echo: Echo,
}

impl Front {
    /// Starts both, the ambassador with these flags and values too.
    pub fn start(flags: &[(&str, &str)]) -> Result<Self> {
        let (here, echo) = (Place::here(), Echo::new(Family::Tcp)?);
        let address = Address::from(SocketAddr::from((Ipv4Addr::LOCALHOST, here.port()?)));
        let launch = Launch::new(&here)?.route(format!("{ROUTE}:{address}={}", echo.address()));
        let launch = flags.iter().fold(launch, |launch, (name, value)| launch.flag(name, value));
        Ok(Self { ambassador: launch.start()?, address, echo })
    }

    /// A connection that has carried five bytes each way.
    pub fn connect(&self) -> Result<Peer> {
        let client = self.address.connect()?;
        client.ask(b"hello", b"hello")?;
        Ok(client)
    }
}

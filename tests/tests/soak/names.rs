//! The name server, which says where the last servers are, or fails in its ways.

use std::net::IpAddr;

use ambassador_tests::place::Place;
use ambassador_tests::server::dnsmasq::Dnsmasq;
use anyhow::{Context, Result};

pub(crate) const NAME: &str = "service.test";

pub(crate) struct Names {
    place: Place,
    servers: [(&'static str, IpAddr); 2],
    /// Where the name leads.
    current: Vec<(&'static str, IpAddr)>,
    server: Option<Dnsmasq>,
}

impl Names {
    /// With the name leading to the first one.
    pub(crate) fn start(place: &Place, servers: [IpAddr; 2]) -> Result<Self> {
        let servers = servers.map(|ip| (NAME, ip));
        let current = servers[..1].to_vec();
        let mut names = Self { place: place.clone(), servers, current, server: None };
        names.revive()?;
        Ok(names)
    }

    /// Has the name lead to the first one, to the second, or to both.
    pub(crate) fn lead(&mut self, choice: u64) -> Result<()> {
        self.current = match choice {
            0 => self.servers[..1].to_vec(),
            1 => self.servers[1..].to_vec(),
            _ => self.servers.to_vec(),
        };
        self.know_again()
    }

    /// Says that there is no such name.
    pub(crate) fn know_none(&self) -> Result<()> {
        self.server()?.answer(&[])
    }

    pub(crate) fn know_again(&self) -> Result<()> {
        self.server()?.answer(&self.current)
    }

    /// Ends the name server: questions are refused.
    pub(crate) fn kill(&mut self) {
        self.server = None;
    }

    pub(crate) fn revive(&mut self) -> Result<()> {
        self.server = Some(Dnsmasq::start(&self.place, &self.current)?);
        Ok(())
    }

    /// Stops it, so that questions are not answered, or has it go on.
    pub(crate) fn signal(&self, signal: libc::c_int) -> Result<()> {
        self.server()?.process.signal(signal)
    }

    fn server(&self) -> Result<&Dnsmasq> {
        self.server.as_ref().context("find the name server")
    }
}

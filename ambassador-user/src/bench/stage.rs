//! What is measured: the ways from a client to the built-in upstream, all open at once.
//!
//! Clients and upstream are in this process. The kernel tiers act on sockets of the cgroup that they are
//! attached to, so where this process is not in it, it goes there, as the self-test does.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::cpu;
use super::load::{Target, connect};
use super::proxy::Proxy;
use super::upstream::PEER;
use crate::config::{Cgroup, InFlight, Tier};
use crate::datapath::cgroup::{self, Visit};
use crate::tier::{Ladder, TIERS};

/// Everything that was started. When dropped, it ends, and this process is in its cgroup again.
pub struct Stage {
    proxies: Vec<Proxy>,
    _visit: Option<Visit>,
    /// The ways that are open, none in between first, then from the highest tier on.
    pub ways: Vec<Way>,
    /// The tiers that are not.
    pub missing: Vec<Missing>,
}

/// One way from a client to the upstream.
#[derive(Debug, Clone)]
pub struct Way {
    /// The tier; none where nobody is in between.
    pub tier: Option<Tier>,
    address: [SocketAddr; 1],
    process: Option<u32>,
}

/// A tier that is not measured.
#[derive(Debug, Clone, Serialize)]
pub struct Missing {
    pub tier: String,
    pub reason: String,
}

impl Stage {
    /// Opens a way through every tier that works here. They end with the calling thread.
    pub fn set(ladder: &Ladder, cgroup: &Cgroup, inflight: InFlight, upstream: SocketAddr) -> Self {
        let mut stage = Self {
            proxies: Vec::new(),
            _visit: None,
            ways: vec![Way::to(None, upstream, None)],
            missing: Vec::new(),
        };
        for tier in TIERS {
            let proxy = match ladder.obstacle(tier) {
                Some(reason) => Err(reason.to_owned()),
                None => Proxy::start(tier, cgroup, inflight, upstream)
                    .map_err(|error| format!("its ambassador did not start: {error:#}")),
            };
            match proxy {
                Ok(proxy) => stage.take(tier, proxy),
                Err(reason) => stage.misses(tier, reason),
            }
        }
        if let Err(error) = stage.enter(cgroup) {
            // Of what is left nothing acts on our sockets.
            for tier in [Tier::Direct, Tier::Sockmap] {
                stage.close(tier, &format!("no connection of this process is its: {error:#}"));
            }
        }
        stage
    }

    /// What the ambassador of a tier has to say of its trouble.
    pub fn troubles(&mut self) -> Vec<String> {
        let tiers: Vec<_> = self.ways.iter().filter_map(|way| way.tier).collect();
        let proxies = self.proxies.iter_mut().zip(tiers);
        proxies.filter_map(|(it, tier)| Some(format!("{tier}: {}", it.trouble()?))).collect()
    }

    /// Makes sure that the kernel tiers act on our connections.
    fn enter(&mut self, choice: &Cgroup) -> Result<()> {
        let Some(direct) = self.ways.iter().find(|way| way.tier == Some(Tier::Direct)) else {
            return Ok(());
        };
        let address = direct.address[0];
        if nobody_is_between(address)? {
            return Ok(());
        }
        self._visit = Some(Visit::below(&cgroup::find(choice)?)?);
        ensure!(nobody_is_between(address)?, "there is somebody in between, even in the cgroup");
        Ok(())
    }

    fn take(&mut self, tier: Tier, proxy: Proxy) {
        self.ways.push(Way::to(Some(tier), proxy.address, Some(proxy.id())));
        self.proxies.push(proxy);
    }

    fn close(&mut self, tier: Tier, reason: &str) {
        let Some(index) = self.ways.iter().position(|way| way.tier == Some(tier)) else { return };
        let way = self.ways.remove(index);
        self.proxies.retain(|proxy| Some(proxy.id()) != way.process);
        self.misses(tier, reason.to_owned());
    }

    fn misses(&mut self, tier: Tier, reason: String) {
        self.missing.push(Missing { tier: tier.to_string(), reason });
    }
}

impl Way {
    /// Through the ambassador of a tier, or to the upstream itself.
    pub fn to(tier: Option<Tier>, address: SocketAddr, process: Option<u32>) -> Self {
        Self { tier, address: [address], process }
    }

    /// What it is called in a table.
    pub fn name(&self) -> String {
        self.tier.map_or_else(|| "no proxy".to_owned(), |tier| tier.to_string())
    }
}

impl Target for Way {
    /// What its ambassador has taken, if there is one and the kernel counts it.
    type Reading = Option<Duration>;

    fn addresses(&self) -> &[SocketAddr] {
        &self.address
    }

    fn read(&self) -> Result<Option<Duration>> {
        Ok(self.process.and_then(|process| cpu::running(process).ok()))
    }
}

/// Whether a connection to there is the one that the upstream has, as its two ends tell.
fn nobody_is_between(address: SocketAddr) -> Result<bool> {
    let mut client = connect(address)?;
    client.write_all(&[PEER]).context("ask who is in between")?;
    let mut port = [0; 2];
    client.read_exact(&mut port).context("hear who is in between")?;
    Ok(u16::from_le_bytes(port) == client.local_addr()?.port())
}

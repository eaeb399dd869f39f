//! The self-test of the `direct` tier: an app, a listener that stands for the ambassador's, and an upstream.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};

use super::{Check, Clock, listen};
use crate::datapath::programs::Maps;
use crate::datapath::tables::{
    End, Ends, IN_ORDER, NO_LIMIT, Plan, Policy, Tables, from_kernel, route_id,
};

type Attempt = fn(&mut Bench) -> Result<()>;

/// A routed address and an upstream.
pub(super) struct Bench {
    tables: Tables,
    ends: Ends,
    /// Stands for the user-space listener.
    routed: TcpListener,
    /// The same on IPv6, where there is any.
    routed6: Option<TcpListener>,
    upstream: TcpListener,
    clock: Clock,
}

impl Bench {
    pub(super) fn new(maps: &mut Maps, clock: Clock) -> Result<Self> {
        let (mut tables, ends) = Tables::new(maps)?;
        let (routed, upstream) = (listen(Ipv4Addr::LOCALHOST)?, listen(Ipv4Addr::LOCALHOST)?);
        let routed6 = listen(Ipv6Addr::LOCALHOST).ok();
        let mut listeners = vec![(routed.local_addr()?, 0)];
        if let Some(routed6) = &routed6 {
            listeners.push((routed6.local_addr()?, 0));
        }
        tables.listen(&listeners)?;
        tables.put(
            0,
            &Plan {
                route: route_id("self-test"),
                policy: Policy::Failover,
                last_resort: true,
                pending_limit: NO_LIMIT,
                limit_each: NO_LIMIT,
                pending_limit_each: NO_LIMIT,
                limit: u32::MAX,
                targets: vec![(upstream.local_addr()?, 1)],
                preferred: 1,
            },
        )?;
        tables.renew(Some(clock.left()))?;
        Ok(Self { tables, ends, routed, routed6, upstream, clock })
    }

    pub(super) fn try_all(&mut self) -> Vec<Check> {
        let tries: [(&str, Attempt); 6] = [
            ("a connection is redirected", |bench| bench.redirects()),
            ("the app sees the address it asked for", Self::restores_the_address),
            ("a bound source is left alone", Self::leaves_bound_sources_alone),
            ("an IPv6-only socket is not led to IPv4", Self::leaves_ipv6_only_alone),
            ("bytes are counted and the end is told", Self::tells_the_end),
            ("nothing is redirected once that is over", Self::closes),
        ];
        let clock = self.clock;
        tries.into_iter().map(|(name, attempt)| clock.check(name, || attempt(self))).collect()
    }

    fn connect(&self) -> Result<TcpStream> {
        let client = TcpStream::connect_timeout(&self.routed.local_addr()?, self.clock.step())
            .context("connect to the routed address")?;
        client.set_read_timeout(Some(self.clock.step()))?;
        Ok(client)
    }

    pub(super) fn redirects(&self) -> Result<()> {
        let _client = self.connect()?;
        let deadline = Instant::now() + self.clock.step();
        while self.clock.arrived(&self.upstream)?.is_none() {
            let natively = self.clock.arrived(&self.routed)?;
            ensure!(natively.is_none(), "it did not reach the upstream, but the routed address");
            ensure!(Instant::now() < deadline, "it did not reach the upstream");
            thread::yield_now();
        }
        Ok(())
    }

    fn restores_the_address(&mut self) -> Result<()> {
        let client = self.connect()?;
        let _server = self.clock.accepted(&self.upstream)?;
        let (shown, asked) = (client.peer_addr()?, self.routed.local_addr()?);
        ensure!(shown == asked, "it sees {shown}, and asked for {asked}");
        Ok(())
    }

    fn leaves_bound_sources_alone(&mut self) -> Result<()> {
        let client = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        client.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        client.connect_timeout(&self.routed.local_addr()?.into(), self.clock.step())?;
        self.clock.accepted(&self.routed).context("it did not reach the routed address")?;
        Ok(())
    }

    fn leaves_ipv6_only_alone(&mut self) -> Result<()> {
        let Some(routed6) = &self.routed6 else { return Ok(()) };
        let client = Socket::new(Domain::IPV6, Type::STREAM, None)?;
        client.set_only_v6(true)?;
        client.connect_timeout(&routed6.local_addr()?.into(), self.clock.step())?;
        self.clock.accepted(routed6).context("it did not reach the routed address")?;
        Ok(())
    }

    fn tells_the_end(&mut self) -> Result<()> {
        self.ends.by_ref().for_each(drop);
        let mut client = self.connect()?;
        let mut server = self.clock.accepted(&self.upstream)?;
        client.write_all(b"question")?;
        server.read_exact(&mut [0; 8])?;
        server.write_all(b"reply")?;
        drop(server);
        client.read_to_end(&mut Vec::new())?;
        let local = client.local_addr()?;
        drop(client);
        let deadline = Instant::now() + self.clock.step();
        let end = loop {
            match self.ends.next() {
                Some(end) if from_kernel(end.flow.local) == local => break end,
                Some(_) => {}
                None => ensure!(Instant::now() < deadline, "it was not told"),
            }
        };
        let End { bytes_up, bytes_down, outcome, .. } = end;
        ensure!(
            (bytes_up, bytes_down, outcome) == (8, 5, IN_ORDER),
            "8 bytes up and 5 down were counted as {bytes_up} and {bytes_down} (outcome {outcome})"
        );
        Ok(())
    }

    fn closes(&mut self) -> Result<()> {
        self.tables.close()?;
        let _client = self.connect()?;
        self.clock.accepted(&self.routed).context("it did not reach the routed address")?;
        Ok(())
    }
}

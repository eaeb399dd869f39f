//! The self-test of the `direct` tier: an app, a listener that stands for the ambassador's, and an upstream;
//! where there is IPv6, also with it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Socket, Type};

use super::{Check, Clock, Skip, listen, reset};
use crate::datapath::programs::Maps;
use crate::datapath::tables::{
    End, Ends, IN_ORDER, NO_LIMIT, Plan, Policy, RESET, RESET_BY_APP, RESET_BY_TARGET, Tables,
    from_kernel, route_id,
};

/// The route of all that is tried.
const ROUTE: u32 = 0;

type Attempt = fn(&mut Bench) -> Result<()>;

/// A routed address and an upstream.
pub(super) struct Bench {
    tables: Tables,
    ends: Ends,
    ipv4: Ways,
    /// Or why there is none.
    ipv6: Result<Ways, String>,
    clock: Clock,
}

/// Where connections may arrive.
struct Ways {
    /// Stands for the user-space listener.
    routed: TcpListener,
    upstream: TcpListener,
}

impl Bench {
    pub(super) fn new(maps: &mut Maps, clock: Clock) -> Result<Self> {
        let (mut tables, ends) = Tables::new(maps)?;
        let ipv4 =
            Ways { routed: listen(Ipv4Addr::LOCALHOST)?, upstream: listen(Ipv4Addr::LOCALHOST)? };
        let ipv6 = listen(Ipv6Addr::LOCALHOST)
            .and_then(|routed| Ok(Ways { routed, upstream: listen(Ipv6Addr::LOCALHOST)? }))
            .map_err(|error| format!("there is no IPv6 here: {error:#}"));
        let all = [Some(&ipv4), ipv6.as_ref().ok()].into_iter().flatten();
        let routed = all.map(|ways| Ok((ways.routed.local_addr()?, ROUTE)));
        tables.listen(&routed.collect::<Result<Vec<_>>>()?)?;
        tables.put(ROUTE, &leading_to(ipv4.upstream.local_addr()?))?;
        tables.renew(Some(clock.left()))?;
        Ok(Self { tables, ends, ipv4, ipv6, clock })
    }

    pub(super) fn try_all(&mut self) -> Vec<Check> {
        let tries: [(&str, Attempt); 9] = [
            ("a connection is redirected", |bench| bench.redirects()),
            ("the app sees the address it asked for", Self::restores_the_address),
            ("a bound source is left alone", Self::leaves_bound_sources_alone),
            ("an IPv6 app is redirected, and sees what it asked for", Self::redirects_ipv6),
            ("a v4-mapped address is redirected, and seen as asked for", Self::redirects_v4_mapped),
            ("an IPv6-only socket is not led to IPv4", Self::leaves_ipv6_only_alone),
            ("bytes are counted and the end is told", Self::tells_the_end),
            ("it is told whose a reset was", Self::tells_whose_reset_it_was),
            ("nothing is redirected once that is over", Self::closes),
        ];
        let clock = self.clock;
        tries.into_iter().map(|(name, attempt)| clock.check(name, || attempt(self))).collect()
    }

    /// Connects to the routed address.
    fn connect(&self) -> Result<TcpStream> {
        let client = TcpStream::connect_timeout(&self.ipv4.routed.local_addr()?, self.clock.step())
            .context("connect to the routed address")?;
        client.set_read_timeout(Some(self.clock.step()))?;
        Ok(client)
    }

    pub(super) fn redirects(&self) -> Result<()> {
        let _client = self.connect()?;
        self.arrives(&self.ipv4).map(drop)
    }

    /// What has connected to a routed address, and must have reached the upstream.
    fn arrives(&self, ways: &Ways) -> Result<TcpStream> {
        self.clock.wait("it did not reach the upstream", || {
            let led = self.clock.arrived(&ways.upstream)?;
            let natively = self.clock.arrived(&ways.routed)?;
            ensure!(natively.is_none(), "it did not reach the upstream, but the routed address");
            Ok(led)
        })
    }

    fn restores_the_address(&mut self) -> Result<()> {
        let client = self.connect()?;
        self.arrives(&self.ipv4)?;
        sees(&client, self.ipv4.routed.local_addr()?)
    }

    fn leaves_bound_sources_alone(&mut self) -> Result<()> {
        let routed = &self.ipv4.routed;
        let client = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        client.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        client.connect_timeout(&routed.local_addr()?.into(), self.clock.step())?;
        self.clock.accepted(routed).context("it did not reach the routed address")?;
        Ok(())
    }

    fn ipv6(&self) -> Result<&Ways> {
        self.ipv6.as_ref().map_err(|why| Skip(why.clone()).into())
    }

    fn redirects_ipv6(&mut self) -> Result<()> {
        let upstream = self.ipv6()?.upstream.local_addr()?;
        self.tables.put(ROUTE, &leading_to(upstream))?;
        let tried = self.ipv6().and_then(|ways| {
            let asked = ways.routed.local_addr()?;
            let client = TcpStream::connect_timeout(&asked, self.clock.step())?;
            self.arrives(ways)?;
            sees(&client, asked)
        });
        self.tables.put(ROUTE, &leading_to(self.ipv4.upstream.local_addr()?))?;
        tried
    }

    /// Such sockets there may be without an address of IPv6.
    fn redirects_v4_mapped(&mut self) -> Result<()> {
        let client = match Socket::new(Domain::IPV6, Type::STREAM, None) {
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                bail!(Skip(format!("there is no IPv6 here: {error}")))
            }
            client => client?,
        };
        client.set_only_v6(false)?;
        let mapped = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
        let asked = SocketAddr::from((mapped, self.ipv4.routed.local_addr()?.port()));
        client.connect_timeout(&asked.into(), self.clock.step())?;
        self.arrives(&self.ipv4)?;
        sees(&client.into(), asked)
    }

    fn leaves_ipv6_only_alone(&mut self) -> Result<()> {
        let Ways { routed, .. } = self.ipv6()?;
        let client = Socket::new(Domain::IPV6, Type::STREAM, None)?;
        client.set_only_v6(true)?;
        client.connect_timeout(&routed.local_addr()?.into(), self.clock.step())?;
        self.clock.accepted(routed).context("it did not reach the routed address")?;
        Ok(())
    }

    fn tells_the_end(&mut self) -> Result<()> {
        let end = self.end_of(|mut client, mut server| {
            client.write_all(b"question")?;
            server.read_exact(&mut [0; 8])?;
            server.write_all(b"reply")?;
            drop(server);
            client.read_to_end(&mut Vec::new())?;
            Ok(())
        })?;
        let End { bytes_up, bytes_down, outcome, .. } = end;
        ensure!(
            (bytes_up, bytes_down, outcome) == (8, 5, IN_ORDER),
            "8 bytes up and 5 down were counted as {bytes_up} and {bytes_down} (outcome {outcome})"
        );
        Ok(())
    }

    fn tells_whose_reset_it_was(&mut self) -> Result<()> {
        let of_upstream = self.end_of(|mut client, server| {
            reset(server)?;
            match client.read(&mut [0]) {
                Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
                other => bail!("it is heard as {other:?}"),
            }
        })?;
        let of_app = self.end_of(|client, _server| reset(client))?;
        match (of_upstream.outcome, of_app.outcome) {
            (RESET_BY_TARGET, RESET_BY_APP) => Ok(()),
            (RESET, RESET) => bail!(Skip(
                "it is not known: that takes CAP_PERFMON, and a kernel that describes its types"
                    .to_owned()
            )),
            (upstream, app) => bail!(
                "resets by the upstream and the app were told as outcomes {upstream} and {app}"
            ),
        }
    }

    /// What is told of a connection when both ends are given up in this way.
    fn end_of(&mut self, live: impl FnOnce(TcpStream, TcpStream) -> Result<()>) -> Result<End> {
        self.ends.by_ref().for_each(drop);
        let client = self.connect()?;
        let server = self.arrives(&self.ipv4)?;
        let local = client.local_addr()?;
        live(client, server)?;
        self.clock.wait("its end was not told", || {
            Ok(self.ends.by_ref().find(|end| from_kernel(end.flow.local) == local))
        })
    }

    fn closes(&mut self) -> Result<()> {
        self.tables.close()?;
        self.leaves_everybody_alone()
    }

    pub(super) fn leaves_everybody_alone(&self) -> Result<()> {
        let _client = self.connect()?;
        let arrived = self.clock.accepted(&self.ipv4.routed);
        arrived.context("it did not reach the routed address")?;
        Ok(())
    }
}

/// A route with one address.
fn leading_to(upstream: SocketAddr) -> Plan {
    Plan {
        route: route_id("self-test"),
        policy: Policy::Failover,
        last_resort: true,
        pending_limit: NO_LIMIT,
        limit_each: NO_LIMIT,
        pending_limit_each: NO_LIMIT,
        limit: u32::MAX,
        targets: vec![(upstream, 1)],
        preferred: 1,
    }
}

fn sees(client: &TcpStream, asked: SocketAddr) -> Result<()> {
    let shown = client.peer_addr()?;
    ensure!(shown == asked, "it sees {shown}, and asked for {asked}");
    Ok(())
}

//! Whether a kernel tier does here what it has to: tried with real sockets, before any app depends on it.

mod sockmap;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Socket, Type};

use super::cgroup::Visit;
use super::kernel;
use super::programs::Programs;
use super::tables::{End, Ends, IN_ORDER, Plan, Policy, Tables, from_kernel, route_id};

pub use sockmap::{Found, sockmap};

/// For any single step; all of it is on loopback.
const STEP: Duration = Duration::from_millis(300);

/// One thing that was tried.
#[derive(Debug)]
pub struct Check {
    pub name: &'static str,
    /// Why it failed, if it did.
    pub failure: Option<String>,
}

impl Check {
    fn of(name: &'static str, tried: Result<()>) -> Self {
        Self { name, failure: tried.err().map(|error| format!("{error:#}")) }
    }
}

type Attempt = fn(&mut Bench) -> Result<()>;

/// The first failure.
pub fn verdict(checks: &[Check]) -> Result<()> {
    for Check { name, failure } in checks {
        if let Some(failure) = failure {
            bail!("{name}: {failure}");
        }
    }
    Ok(())
}

/// Tries the `direct` tier in a cgroup. An error if it could not be tried at all.
pub fn direct(cgroup: &Path) -> Result<Vec<Check>> {
    let mut bench = Bench::new(cgroup)?;
    // Where the ambassador is a part of the Pod, it is in the Pod's cgroup already.
    let _visit = if bench.redirects().is_ok() { None } else { Some(Visit::below(cgroup)?) };
    let tries: [(&str, Attempt); 6] = [
        ("a connection is redirected", |bench| bench.redirects()),
        ("the app sees the address it asked for", Bench::restores_the_address),
        ("a bound source is left alone", Bench::leaves_bound_sources_alone),
        ("an IPv6-only socket is not led to IPv4", Bench::leaves_ipv6_only_alone),
        ("bytes are counted and the end is told", Bench::tells_the_end),
        ("nothing is redirected once that is over", Bench::closes),
    ];
    let checks = tries.into_iter().map(|(name, attempt)| Check::of(name, attempt(&mut bench)));
    Ok(checks.collect())
}

/// Programs and maps of its own, a routed address and an upstream.
struct Bench {
    tables: Tables,
    ends: Ends,
    /// Stands for the user-space listener.
    routed: TcpListener,
    /// The same on IPv6, where there is any.
    routed6: Option<TcpListener>,
    upstream: TcpListener,
    _links: super::programs::Links,
}

impl Bench {
    fn new(cgroup: &Path) -> Result<Self> {
        let mut programs = Programs::load(1)?;
        let opened = File::open(cgroup).with_context(|| format!("open {}", cgroup.display()))?;
        let links = programs.attach(&opened)?;
        let (mut tables, ends) = Tables::new(&mut programs.maps())?;
        tables.found(kernel::settings(cgroup, false)?)?;
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
                limit: u32::MAX,
                targets: vec![(upstream.local_addr()?, 1)],
                preferred: 1,
            },
        )?;
        tables.renew(Some(Duration::from_secs(5)))?;
        Ok(Self { tables, ends, routed, routed6, upstream, _links: links })
    }

    fn connect(&self) -> Result<TcpStream> {
        let client = TcpStream::connect_timeout(&self.routed.local_addr()?, STEP)
            .context("connect to the routed address")?;
        client.set_read_timeout(Some(STEP))?;
        Ok(client)
    }

    fn redirects(&self) -> Result<()> {
        let _client = self.connect()?;
        accepted(&self.upstream).context("it did not reach the upstream")?;
        Ok(())
    }

    fn restores_the_address(&mut self) -> Result<()> {
        let client = self.connect()?;
        let _server = accepted(&self.upstream)?;
        let (shown, asked) = (client.peer_addr()?, self.routed.local_addr()?);
        ensure!(shown == asked, "it sees {shown}, and asked for {asked}");
        Ok(())
    }

    fn leaves_bound_sources_alone(&mut self) -> Result<()> {
        let client = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        client.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        client.connect_timeout(&self.routed.local_addr()?.into(), STEP)?;
        accepted(&self.routed).context("it did not reach the routed address")?;
        Ok(())
    }

    fn leaves_ipv6_only_alone(&mut self) -> Result<()> {
        let Some(routed6) = &self.routed6 else { return Ok(()) };
        let client = Socket::new(Domain::IPV6, Type::STREAM, None)?;
        client.set_only_v6(true)?;
        client.connect_timeout(&routed6.local_addr()?.into(), STEP)?;
        accepted(routed6).context("it did not reach the routed address")?;
        Ok(())
    }

    fn tells_the_end(&mut self) -> Result<()> {
        self.ends.by_ref().for_each(drop);
        let mut client = self.connect()?;
        let mut server = accepted(&self.upstream)?;
        client.write_all(b"question")?;
        server.read_exact(&mut [0; 8])?;
        server.write_all(b"reply")?;
        drop(server);
        client.read_to_end(&mut Vec::new())?;
        let local = client.local_addr()?;
        drop(client);
        let deadline = Instant::now() + STEP;
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
        accepted(&self.routed).context("it did not reach the routed address")?;
        Ok(())
    }
}

fn listen(address: impl Into<IpAddr>) -> Result<TcpListener> {
    let listener = TcpListener::bind((address.into(), 0)).context("listen on loopback")?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// The connection that has been made to a listener; on loopback it is there by then.
fn accepted(listener: &TcpListener) -> Result<TcpStream> {
    let (stream, _) = listener.accept().map_err(|error| match error.kind() {
        ErrorKind::WouldBlock => anyhow::anyhow!("nobody is there"),
        _ => error.into(),
    })?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(STEP))?;
    Ok(stream)
}

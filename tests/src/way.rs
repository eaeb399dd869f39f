//! The way a test's connections take. What the ambassador owes is "as on a direct connection", so
//! every behaviour is expected of a direct connection first, and then of each relay.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::ops::AddAssign;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::address::{Address, Family};
use crate::ambassador::{self, Ambassador, Launch};
use crate::cgroup;
use crate::peer::{Listener, Peer};
use crate::place::Place;
use crate::pod::is_root;
use crate::skip;
use crate::wait::until_true;

/// What the relay takes at once, at the most.
const ONE_PIECE: u64 = 64 << 10;

/// From a client to its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Straight: proves that the expectation itself is true.
    Unproxied,
    /// Through an ambassador that copies.
    Copy,
    /// Through an ambassador that splices.
    Splice,
    /// Through an ambassador into whose upstream connection the kernel puts what the client writes.
    Sockmap,
    /// Past an ambassador that makes the client's own socket the upstream connection.
    Direct,
    /// Through an ambassador that may take `sockmap` where no client notices it, and not `direct`.
    Auto,
    /// The same, and somebody vouches that all clients are non-blocking.
    Vouched,
    /// The same, but clients are so only until they have a shortcut.
    Turned,
}

/// A way that leads to a server.
#[derive(Debug)]
pub struct Road {
    /// Where clients connect to.
    pub address: Address,
    /// What is in between, if anything.
    pub ambassador: Option<Ambassador>,
    /// Which way it leads.
    pub way: Way,
    _directory: TempDir,
}

/// What went from clients to servers, and back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bytes {
    /// From clients.
    pub up: u64,
    /// To clients.
    pub down: u64,
}

/// A server in the hands of the test, and a road that leads to it.
#[derive(Debug)]
pub struct Wire {
    /// Accepts what arrives at the far end.
    pub listener: Listener,
    /// Where clients come from.
    pub road: Road,
}

impl Way {
    /// Every relay.
    pub const RELAYS: [Self; 2] = [Self::Copy, Self::Splice];

    /// Every way with an ambassador that TCP can take on this machine.
    pub fn proxied() -> Result<Vec<Self>> {
        Ok(Self::all()?.split_off(1))
    }

    /// Every way that TCP can take on this machine, an unproxied connection first. One that cannot be taken
    /// is a part of the test that is skipped.
    pub fn all() -> Result<Vec<Self>> {
        let mut ways = vec![Self::Unproxied, Self::Copy, Self::Splice];
        for way in [Self::Sockmap, Self::Direct] {
            match way.obstacle(Family::Tcp)? {
                None => ways.push(way),
                Some(obstacle) => skip::in_part(&obstacle),
            }
        }
        Ok(ways)
    }

    /// An ambassador in a place whose routes lead this way, but for what their configuration has to say.
    pub fn launch(self, place: &Place) -> Result<Launch> {
        match self {
            // What it pins is nobody else's business, and stays if a test ends it.
            Self::Sockmap | Self::Direct | Self::Auto | Self::Vouched | Self::Turned => {
                self.launch_in(&place.with_bpffs()?)
            }
            _ => self.launch_in(place),
        }
    }

    /// The same with what it pins in the place itself: for who looks at that, or leaves it to the next one.
    pub fn launch_in(self, place: &Place) -> Result<Launch> {
        let launch = Launch::new(place)?;
        match self {
            Self::Sockmap | Self::Direct => launch.in_kernel(self),
            Self::Auto | Self::Vouched | Self::Turned => {
                Ok(launch.cgroup(cgroup::of_this_process()?))
            }
            _ => Ok(launch.flag("--tier", self.to_string())),
        }
    }

    /// Why it cannot be taken by sockets of this family on this machine; `None` when it can.
    pub fn obstacle(self, family: Family) -> Result<Option<String>> {
        if family == Family::Tcp6 && TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_err() {
            return Ok(Some("there is no IPv6 on the loopback here".to_owned()));
        }
        match self {
            Self::Unproxied | Self::Copy | Self::Splice => Ok(None),
            _ if !is_root() => Ok(Some(format!("{self}: needs root"))),
            Self::Auto | Self::Vouched | Self::Turned => Self::Sockmap.obstacle(family),
            Self::Sockmap | Self::Direct => match cgroup::of_this_process() {
                Ok(_) => ambassador::obstacle(&self.to_string()),
                Err(error) => Ok(Some(format!("{self}: {error:#}"))),
            },
        }
    }
}

/// Ends a test that needs a tier that cannot be used on this machine.
#[macro_export]
macro_rules! needs {
    ($way:ident) => {
        if let Some(obstacle) = $crate::way::Way::$way.obstacle($crate::address::Family::Tcp)? {
            $crate::skip!("{obstacle}");
        }
    };
}

/// As `--tier` wants it.
impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unproxied => "unproxied",
            Self::Copy => "copy",
            Self::Splice => "splice",
            Self::Sockmap => "sockmap",
            Self::Direct => "direct",
            Self::Auto | Self::Vouched | Self::Turned => "auto",
        })
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, more: Self) {
        *self = Self { up: self.up + more.up, down: self.down + more.down };
    }
}

impl Road {
    /// From clients in `place`, whose sockets are of `family`, to `server`.
    pub fn to(server: &Address, way: Way, place: &Place, family: Family) -> Result<Self> {
        Self::with(server, way, place, family, &[])
    }

    /// The same, its ambassador with these flags and values too.
    fn with(
        server: &Address,
        way: Way,
        place: &Place,
        family: Family,
        flags: &[(&str, &str)],
    ) -> Result<Self> {
        let directory = tempfile::tempdir().context("create a road's directory")?;
        if way == Way::Unproxied {
            return Ok(Self {
                address: server.clone(),
                ambassador: None,
                way,
                _directory: directory,
            });
        }
        let address = match family {
            Family::Tcp => SocketAddr::from((Ipv4Addr::LOCALHOST, place.port()?)).into(),
            Family::Tcp6 => SocketAddr::from((Ipv6Addr::LOCALHOST, place.port()?)).into(),
            Family::Unix => Address::Unix(directory.path().join("client.sock")),
        };
        let route = format!("road:{address}={server}");
        let launch = match way {
            Way::Auto | Way::Vouched | Way::Turned => {
                let clients = if way == Way::Auto { "any" } else { "nonblocking" };
                let launch = way.launch(place)?;
                // Somebody must watch for the timeout, which keeps `direct` out.
                launch.config(&format!(
                    "version: 1
routes: [{{ name: road, listen: '{address}', upstream: u, idle_timeout: 1h, clients: {clients} }}]
upstreams: {{ u: {{ endpoints: ['{server}'] }} }}
"
                ))?
            }
            _ => way.launch(place)?.route(route),
        };
        let launch = flags.iter().fold(launch, |launch, (name, value)| launch.flag(name, value));
        let ambassador = launch.start()?;
        Ok(Self { address, ambassador: Some(ambassador), way, _directory: directory })
    }

    /// Expects of its ambassador, if there is one, to say that it has carried just these connections, by
    /// the tier that the way is, that all ended in order, and that nothing is left open. On sockmap, clients
    /// that said it all in one piece were relayed: that not all of them did is for [`Self::had_shortcuts`].
    pub fn has_carried(&self, connections: u64, bytes: Option<Bytes>) -> Result<()> {
        let Some(ambassador) = &self.ambassador else { return Ok(()) };
        let tier = self.way.to_string();
        let count = |name: &str, labels: &[(&str, &str)]| -> Result<u64> {
            Ok(ambassador.metrics()?.sum(name, labels).unwrap_or(0.0) as u64)
        };
        let ended = || count("ambassador_connections_total", &[]);
        until_true("the end of every connection", || Ok(ended()? >= connections))
            .with_context(|| format!("{:?} of {connections} connections ended", ended()))?;
        until_true("the last connection to be forgotten", || {
            let open = ambassador.command(&["connections", "--json"])?.success()?;
            Ok(open.is_empty() && count("ambassador_connections_active", &[])? == 0)
        })?;

        let of_tier = [("tier", tier.as_str()), ("outcome", "ok")];
        let (all, mut in_order) = (ended()?, count("ambassador_connections_total", &of_tier)?);
        if self.way == Way::Sockmap {
            let mut relayed = ambassador.access_records("tier", "splice")?;
            relayed.retain(|it| {
                it["outcome"] == "ok" && it["bytes_up"].as_u64().is_some_and(|up| up <= ONE_PIECE)
            });
            in_order += relayed.len() as u64;
        }
        if all != connections || in_order != connections {
            let mut others = ambassador.access_records("route", "road")?;
            others.retain(|record| record["tier"] != tier || record["outcome"] != "ok");
            bail!(
                "{all} connections where {connections} should be, {in_order} of them by {tier} and \
                 in order; the others: {}",
                Value::from(others)
            );
        }
        let moved = |direction| {
            let of =
                |tier| count("ambassador_bytes_total", &[("tier", tier), ("direction", direction)]);
            let relayed = if self.way == Way::Sockmap { of("splice")? } else { 0 };
            anyhow::Ok(of(tier.as_str())? + relayed)
        };
        let carried = Bytes { up: moved("up")?, down: moved("down")? };
        let expected = bytes.unwrap_or(carried);
        ensure!(carried == expected, "{carried:?} by {tier} where {expected:?} should be");
        Ok(())
    }

    /// Where the way leads through `sockmap`, expects that so many connections at least have ended that had
    /// a shortcut. It takes clients that go on after their first piece.
    pub fn had_shortcuts(&self, at_least: u64) -> Result<()> {
        let (Way::Sockmap | Way::Vouched, Some(ambassador)) = (self.way, &self.ambassador) else {
            return Ok(());
        };
        let had = || {
            let ended = ambassador.metrics()?;
            let ended = ended.sum("ambassador_connections_total", &[("tier", "sockmap")]);
            anyhow::Ok(ended.unwrap_or(0.0) as u64)
        };
        until_true("the end of connections with a shortcut", || Ok(had()? >= at_least))
            .with_context(|| format!("{:?} had one, and {at_least} should have", had()))
    }

    /// A client, of the kind that the way is for: where sockmap may be taken a non-blocking one. What sockmap
    /// is for others is shown by the tests of what an app can notice.
    pub fn connect(&self) -> Result<Peer> {
        match self.way {
            Way::Sockmap | Way::Auto | Way::Vouched | Way::Turned => {
                self.address.connect_without_blocking()
            }
            _ => self.address.connect(),
        }
    }

    /// Whether what a client sends takes a shortcut by now.
    fn has_shortcut(&self) -> Result<bool> {
        let ambassador = self.ambassador.as_ref().context("find the ambassador")?;
        Ok(ambassador.tiers()?.iter().any(|tier| tier == "sockmap"))
    }
}

impl Wire {
    /// From clients to a server, both of this family, here on the machine's loopback.
    pub fn new(way: Way, family: Family) -> Result<Self> {
        Self::between(way, family, family)
    }

    /// The same for TCP, its ambassador with these flags and values too.
    pub fn with(way: Way, flags: &[(&str, &str)]) -> Result<Self> {
        let listener = Listener::new(Family::Tcp)?;
        let road = Road::with(listener.address(), way, &Place::here(), Family::Tcp, flags)?;
        Ok(Self { listener, road })
    }

    /// From clients of one family to a server of another, which takes a relay.
    pub fn between(way: Way, client: Family, server: Family) -> Result<Self> {
        let listener = Listener::new(server)?;
        let road = Road::to(listener.address(), way, &Place::here(), client)?;
        Ok(Self { listener, road })
    }

    /// A client and the server's end of its connection.
    pub fn pair(&self) -> Result<(Peer, Peer)> {
        let (client, server) = (self.road.connect()?, self.listener.accept()?);
        if self.road.way == Way::Turned {
            until_true("a client's shortcut", || {
                exchange(&client, &server)?;
                self.road.has_shortcut()
            })?;
        }
        Ok((client, server))
    }

    /// The same, with a client that waits inside its reads and writes, whatever the way. One that was not always
    /// so has said something since.
    pub fn blocking_pair(&self) -> Result<(Peer, Peer)> {
        if self.road.way != Way::Turned {
            return Ok((self.road.address.connect()?, self.listener.accept()?));
        }
        let (client, server) = self.pair()?;
        client.socket().set_nonblocking(false).context("make a client blocking")?;
        exchange(&client, &server)?;
        Ok((client, server))
    }
}

/// A few bytes each way.
pub fn exchange(client: &Peer, server: &Peer) -> Result<()> {
    client.say(b"question")?;
    ensure!(server.hear(8)? == b"question");
    server.say(b"answer")?;
    ensure!(client.hear(6)? == b"answer");
    Ok(())
}

/// Makes tests of behaviours: `on_every_way!(tcp: Tcp; a, b)` expects `a` and `b` of the functions
/// of these names, which take a `&Wire`, on a direct connection and on every way that there is for
/// the family.
///
/// `on_every_way!(tcp: Auto; a, b)` expects them where an ambassador chooses for each client.
#[macro_export]
macro_rules! on_every_way {
    ($module:ident: Auto; $($behaviour:ident),+ $(,)?) => {
        mod $module {
            $crate::on_every_way!(@way any Auto Tcp; $($behaviour),+);
            $crate::on_every_way!(@way vouched Vouched Tcp; $($behaviour),+);
            $crate::on_every_way!(@way turned Turned Tcp; $($behaviour),+);
        }
    };
    ($module:ident: Unix; $($behaviour:ident),+ $(,)?) => {
        mod $module {
            $crate::on_every_way!(@way unproxied Unproxied Unix; $($behaviour),+);
            $crate::on_every_way!(@way copy Copy Unix; $($behaviour),+);
            $crate::on_every_way!(@way splice Splice Unix; $($behaviour),+);
        }
    };
    ($module:ident: $family:ident; $($behaviour:ident),+ $(,)?) => {
        mod $module {
            $crate::on_every_way!(@way unproxied Unproxied $family; $($behaviour),+);
            $crate::on_every_way!(@way copy Copy $family; $($behaviour),+);
            $crate::on_every_way!(@way splice Splice $family; $($behaviour),+);
            $crate::on_every_way!(@way sockmap Sockmap $family; $($behaviour),+);
            $crate::on_every_way!(@way direct Direct $family; $($behaviour),+);
        }
    };
    (@way $module:ident $way:ident $family:ident; $($behaviour:ident),+) => {
        mod $module {
            use $crate::address::Family;
            use $crate::way::{Way, Wire};
            $(
                #[test]
                fn $behaviour() -> anyhow::Result<()> {
                    if let Some(obstacle) = Way::$way.obstacle(Family::$family)? {
                        $crate::skip!("{obstacle}");
                    }
                    super::super::$behaviour(&Wire::new(Way::$way, Family::$family)?)
                }
            )+
        }
    };
}

//! Who takes part: servers, a name server, and an ambassador of each tier, all of which can be hurt.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::place::{BPFFS, Place};
use ambassador_tests::pod::Pod;
use ambassador_tests::process::{Process, run};
use ambassador_tests::server::dnsmasq::Dnsmasq;
use ambassador_tests::wait::{SOON, until};
use ambassador_tests::way::Way;
use anyhow::{Context, Result, ensure};

use crate::hurts::{Hurts, Part};

/// Of the servers, the last two have a name in common, one after the other or both at once.
const SERVERS: u8 = 5;
const NAME: &str = "service.test";
const TIERS: [Way; 3] = [Way::Direct, Way::Sockmap, Way::Splice];

pub(crate) struct Scene {
    pub(crate) pod: Pod,
    pub(crate) servers: Vec<Server>,
    pub(crate) posts: Vec<Post>,
    pub(crate) hurts: Arc<Hurts>,
    dns: Dnsmasq,
}

/// A server, and what those before it in its place have reported.
pub(crate) struct Server {
    number: usize,
    pub(crate) address: SocketAddr,
    process: Option<Process>,
    reported: String,
}

/// A place for an ambassador.
pub(crate) struct Post {
    pub(crate) way: Way,
    pub(crate) route: Address,
    pub(crate) place: Place,
    endpoints: String,
    extra: SocketAddr,
    variation: u64,
    ambassador: Option<Ambassador>,
}

impl Scene {
    pub(crate) fn new(pod: Pod) -> Result<Self> {
        let port = pod.upstream.port()?;
        let mut servers = Vec::new();
        for number in 0..SERVERS {
            let ip = Ipv4Addr::new(10, 77, 0, 10 + number);
            let add = format!("{ip}/24");
            let mut command = pod.upstream.command("ip");
            run(command.args(["addr", "add", &add, "dev", "eth0"]), SOON)?;
            let number = usize::from(number);
            let address = SocketAddr::from((ip, port));
            let mut server = Server { number, address, process: None, reported: String::new() };
            server.start(&pod.upstream, false)?;
            servers.push(server);
        }
        let dns = Dnsmasq::start(&pod.upstream, &[(NAME, servers[3].address.ip())])?;
        let named = pod.inside.with_resolver(&Dnsmasq::resolv_conf(pod.upstream.ipv4))?;
        let endpoints = servers[..3].iter().map(|it| it.address.to_string());
        let endpoints = endpoints.chain([format!("{NAME}:{port}")]);
        let endpoints = endpoints.map(|it| format!("'{it}'")).collect::<Vec<_>>().join(", ");
        let posts = TIERS.into_iter().map(|way| {
            let own =
                || Ok::<_, anyhow::Error>(SocketAddr::from((Ipv4Addr::LOCALHOST, named.port()?)));
            let mut post = Post {
                way,
                route: own()?.into(),
                place: named.with_bpffs()?,
                endpoints: endpoints.clone(),
                extra: own()?,
                variation: 0,
                ambassador: None,
            };
            post.start()?;
            Ok(post)
        });
        let posts = posts.collect::<Result<Vec<_>>>()?;
        Ok(Self { pod, servers, posts, hurts: Arc::default(), dns })
    }

    /// Has the name lead to the server before the last, to the last, or to both.
    pub(crate) fn rename(&self, choice: u64) -> Result<()> {
        let names: [(&str, IpAddr); 2] =
            [3, 4].map(|server: usize| (NAME, self.servers[server].address.ip()));
        self.dns.answer(match choice % 3 {
            0 => &names[..1],
            1 => &names[1..],
            _ => &names,
        })
    }

    /// Has packets to a server dropped.
    pub(crate) fn blackhole(&self, server: usize) -> Result<()> {
        let ip = self.servers[server].address.ip();
        self.pod.upstream.blackhole(&format!("ip daddr {ip}"))
    }

    /// Has them arrive again.
    pub(crate) fn lift_blackhole(&self) -> Result<()> {
        self.pod.upstream.filter("flush ruleset")
    }

    /// Does something to one of the parts that hurts it until that is over.
    pub(crate) fn hurt(
        &mut self,
        part: Part,
        act: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        self.hurts.begin(part);
        act(self)?;
        self.hurts.end(part);
        Ok(())
    }

    /// What all servers have reported, whoever of them was killed since.
    pub(crate) fn reports(&self) -> Vec<String> {
        self.servers.iter().map(Server::reports).collect()
    }

    /// Ends the ambassadors, and expects that nothing is left of them.
    pub(crate) fn end(self) -> Result<()> {
        for mut post in self.posts {
            post.ambassador.take().context("find the ambassador")?.end()?;
            let left = run(post.place.command("ls").arg(BPFFS), SOON)?;
            ensure!(!left.contains("ambassador"), "{} left {left}", post.way);
        }
        Ok(())
    }
}

impl Server {
    /// Starts it, so that it serves or resets whoever comes.
    pub(crate) fn start(&mut self, place: &Place, is_rude: bool) -> Result<()> {
        let mut command = place.command(env!("CARGO_BIN_EXE_conversing"));
        command.arg(self.number.to_string()).arg(self.address.to_string());
        command.args(is_rude.then_some("rude"));
        let mut process = Process::start(&mut command)?;
        let address = Address::from(self.address);
        until("a server", SOON, || {
            process.still_runs()?;
            Ok(place.enter(|| address.connect()).ok())
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Ends it without a warning.
    pub(crate) fn kill(&mut self) -> Result<()> {
        let process = self.process.take().context("find the server")?;
        process.signal(libc::SIGKILL)?;
        self.reported += &process.finish(SOON)?.stdout;
        // A line that was cut is none.
        self.reported.truncate(self.reported.rfind('\n').map_or(0, |end| end + 1));
        Ok(())
    }

    pub(crate) fn signal(&self, signal: libc::c_int) -> Result<()> {
        self.process.as_ref().context("find the server")?.signal(signal)
    }

    fn reports(&self) -> String {
        let current = self.process.as_ref().map(Process::stdout).unwrap_or_default();
        format!("{}{current}", self.reported)
    }
}

impl Post {
    /// Starts the ambassador, which takes over what one before it has pinned.
    pub(crate) fn start(&mut self) -> Result<()> {
        let launch = self.way.launch_in(&self.place)?.flag("--drain-deadline", "5s");
        self.ambassador = Some(launch.config(&self.config())?.start()?);
        Ok(())
    }

    pub(crate) fn kill(&mut self) -> Result<()> {
        let ambassador = self.ambassador.take().context("find the ambassador")?;
        ambassador.process.signal(libc::SIGKILL)?;
        ambassador.process.finish(SOON).map(drop)
    }

    /// Gives it another configuration.
    pub(crate) fn reconfigure(&mut self, variation: u64) -> Result<()> {
        self.variation = variation;
        self.ambassador()?.reconfigure(&self.config())?.success().map(drop)
    }

    /// Gives it one that is bad, and expects that it is refused.
    pub(crate) fn misconfigure(&self) -> Result<()> {
        let told = self.ambassador()?.reconfigure(&self.config().replace("listen", "lisen"))?;
        ensure!(told.code() == Some(78), "a bad configuration: {told:?}");
        // For the watch would read it again.
        std::fs::write(self.ambassador()?.configuration(), self.config()).context("mend it")
    }

    pub(crate) fn ambassador(&self) -> Result<&Ambassador> {
        self.ambassador.as_ref().context("find the ambassador")
    }

    /// Of the variations, some lack a server that the others have, or have a route that they lack.
    fn config(&self) -> String {
        let bit = |number: u64| self.variation >> number & 1 == 1;
        let balance = ["round_robin", "least_connections", "random_two"];
        let balance = balance[(self.variation % 3) as usize];
        let endpoints = match bit(4) {
            true => self.endpoints.split_once(", ").map_or("", |(_, rest)| rest),
            false => &self.endpoints,
        };
        let extra = match bit(5) {
            true => format!("  - {{ name: extra, listen: '{}', upstream: u }}\n", self.extra),
            false => String::new(),
        };
        let health = if bit(6) { "health: { check: tcp, interval: 200ms }" } else { "" };
        let limit = if bit(7) { 5_000 } else { 10_000 };
        let route = &self.route;
        format!(
            "version: 1
routes:
  - {{ name: soaked, listen: '{route}', upstream: u, max_connections: {limit} }}
{extra}upstreams:
  u:
    endpoints: [{endpoints}]
    balance: {balance}
    connect: {{ timeout: 1s }}
    dns: {{ max_ttl: 1s }}
    eject: {{ consecutive_failures: 2, for: 500ms }}
    {health}
"
        )
    }
}

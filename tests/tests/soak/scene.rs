//! Who takes part: servers, a name server, and an ambassador of each tier, all of which can be hurt, several at once.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ambassador_tests::pod::Pod;
use ambassador_tests::process::run;
use ambassador_tests::server::dnsmasq::Dnsmasq;
use ambassador_tests::wait::SOON;
use ambassador_tests::way::Way;
use anyhow::Result;

use crate::hurts::{Hurts, Part};
use crate::names::{NAME, Names};
use crate::post::Post;
use crate::server::Server;
use crate::variation::Theme;

/// Of the servers, the last two have a name in common, one after the other or both at once.
pub(crate) const SERVERS: usize = 5;
pub(crate) const NAMED: [usize; 2] = [3, 4];
pub(crate) const POSTS: usize = TIERS.len();
const TIERS: [Way; 3] = [Way::Direct, Way::Sockmap, Way::Splice];

pub(crate) struct Scene {
    servers: Vec<Mutex<Server>>,
    posts: Vec<Mutex<Post>>,
    names: Mutex<Names>,
    pub(crate) hurts: Hurts,
}

impl Scene {
    pub(crate) fn new(pod: &Pod) -> Result<Self> {
        let port = pod.upstream.port()?;
        let (mut servers, mut addresses) = (Vec::new(), Vec::new());
        for number in 0..SERVERS {
            let ip = Ipv4Addr::new(10, 77, 0, 10 + number as u8);
            let add = format!("{ip}/24");
            let mut command = pod.upstream.command("ip");
            run(command.args(["addr", "add", &add, "dev", "eth0"]), SOON)?;
            let address = SocketAddr::from((ip, port));
            servers.push(Mutex::new(Server::new(number, address, &pod.upstream)?));
            addresses.push(address);
        }
        let named: [IpAddr; 2] = NAMED.map(|server| addresses[server].ip());
        let names = Mutex::new(Names::start(&pod.upstream, named)?);
        let inside = pod.inside.with_resolver(&Dnsmasq::resolv_conf(pod.upstream.ipv4))?;
        let endpoints = addresses[..NAMED[0]].iter().map(SocketAddr::to_string);
        let endpoints: Vec<_> = endpoints.chain([format!("{NAME}:{port}")]).collect();
        let posts = TIERS.into_iter().map(|way| {
            let own = || inside.port().map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
            let endpoints = endpoints.clone();
            let theme = Theme { route: own()?.into(), extra: own()?, endpoints };
            Ok(Mutex::new(Post::new(way, inside.with_bpffs()?, theme)?))
        });
        let posts = posts.collect::<Result<_>>()?;
        Ok(Self { servers, posts, names, hurts: Hurts::default() })
    }

    /// One of the servers, which is nobody else's meanwhile.
    pub(crate) fn server(&self, number: usize) -> MutexGuard<'_, Server> {
        lock(&self.servers[number])
    }

    /// All of them.
    pub(crate) fn servers(&self) -> Vec<MutexGuard<'_, Server>> {
        self.servers.iter().map(lock).collect()
    }

    /// The place of an ambassador, likewise.
    pub(crate) fn post(&self, number: usize) -> MutexGuard<'_, Post> {
        lock(&self.posts[number])
    }

    /// All of them.
    pub(crate) fn posts(&self) -> Vec<MutexGuard<'_, Post>> {
        self.posts.iter().map(lock).collect()
    }

    /// The name server, likewise.
    pub(crate) fn names(&self) -> MutexGuard<'_, Names> {
        lock(&self.names)
    }

    /// Does something that hurts parts until it is over.
    pub(crate) fn hurt(&self, parts: &[Part], act: impl FnOnce() -> Result<()>) -> Result<()> {
        parts.iter().for_each(|part| self.hurts.begin(*part));
        act()?;
        parts.iter().for_each(|part| self.hurts.end(*part));
        Ok(())
    }

    /// Ends the ambassadors, and expects that nothing is left of them.
    pub(crate) fn end(self) -> Result<()> {
        let posts = self.posts.into_iter();
        posts
            .map(|it| it.into_inner().unwrap_or_else(PoisonError::into_inner))
            .try_for_each(Post::end)
    }
}

fn lock<T>(it: &Mutex<T>) -> MutexGuard<'_, T> {
    it.lock().unwrap_or_else(PoisonError::into_inner)
}

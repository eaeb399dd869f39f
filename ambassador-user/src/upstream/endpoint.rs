//! One place that a service is reached at: an address, a Unix socket, or a name with all that it points to.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use std::net::SocketAddr;

use super::balance::{Source, rank};
use super::dns::{Name, Names};
use super::health::{Health, STEPS};
use super::host::{At, Host, alternate_families};
use super::lookup::Question;
use crate::config;

/// So many hosts that have left a name are remembered.
const MOST_LEFT: usize = 64;

/// An endpoint in service.
#[derive(Debug)]
pub struct Endpoint {
    label: Arc<str>,
    weight: u32,
    place: Place,
    // These go on when the weight is changed.
    active: Arc<AtomicU32>,
    ejections: Arc<AtomicU64>,
    /// Which of a name's addresses is tried first; moves on so that all are used.
    turn: AtomicUsize,
}

#[derive(Debug)]
enum Place {
    /// The only one.
    Host(Arc<[Arc<Host>]>),
    Name {
        name: Arc<Name>,
        port: Option<u16>,
        hosts: Mutex<Hosts>,
    },
}

/// The hosts of a name: those that stay when it points elsewhere go on.
#[derive(Debug, Clone, Default)]
struct Hosts {
    /// The answer that they are made of.
    answer: Arc<[SocketAddr]>,
    all: Arc<[Arc<Host>]>,
    left: Left,
}

/// The hosts that a name pointed to before, the last ones last: they may have connections, or return.
#[derive(Debug, Clone, Default)]
struct Left(Vec<Arc<Host>>);

/// One connection's share of an endpoint, given back when dropped.
#[derive(Debug)]
pub struct Lease(Arc<Endpoint>);

impl Endpoint {
    pub(super) fn new(
        meant: &config::Endpoint,
        upstream: &config::Upstream,
        before: Option<&Arc<Self>>,
        names: &mut Names,
    ) -> Self {
        let host = |at| match before.map(|before| &before.place) {
            Some(Place::Host(host)) => Arc::clone(host),
            _ => Arc::new([Host::new(at)]),
        };
        let mut name = |question, port| Place::Name {
            name: names.get(question, upstream.dns),
            port,
            hosts: Mutex::new(
                before.map(|before| before.of_name(Hosts::clone)).unwrap_or_default(),
            ),
        };
        let place = match &meant.target {
            config::Target::Address(address) => Place::Host(host(At::Tcp(*address))),
            config::Target::Unix(path) => Place::Host(host(At::Unix(path.clone()))),
            config::Target::Name { host, port } => {
                name(Question::Host(Arc::clone(host)), Some(*port))
            }
            config::Target::Service(service) => name(Question::Service(Arc::clone(service)), None),
        };
        Self {
            label: meant.target.to_string().into(),
            weight: u32::from(meant.weight.get()),
            place,
            active: before.map(|before| Arc::clone(&before.active)).unwrap_or_default(),
            ejections: before.map(|before| Arc::clone(&before.ejections)).unwrap_or_default(),
            turn: AtomicUsize::new(0),
        }
    }

    /// The endpoint as the user wrote it.
    pub fn label(&self) -> &Arc<str> {
        &self.label
    }

    pub fn weight(&self) -> u32 {
        self.weight
    }

    pub fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed)
    }

    /// How often one of its hosts was taken out.
    pub fn ejections(&self) -> u64 {
        self.ejections.load(Ordering::Relaxed)
    }

    pub(super) fn count_ejection(&self) {
        self.ejections.fetch_add(1, Ordering::Relaxed);
    }

    /// All that it is known to be reached at now.
    pub fn hosts(&self) -> Arc<[Arc<Host>]> {
        match &self.place {
            Place::Host(host) => Arc::clone(host),
            Place::Name { .. } => self.of_name(|hosts| Arc::clone(&hosts.all)),
        }
    }

    /// The same, and all that its name has left and may return to.
    pub(super) fn remembered(&self) -> Vec<Arc<Host>> {
        match &self.place {
            Place::Host(host) => host.to_vec(),
            Place::Name { .. } => self.of_name(|Hosts { all, left: Left(left), .. }| {
                all.iter().chain(left).cloned().collect()
            }),
        }
    }

    /// Hosts that its name has left while there are connections to them.
    pub fn left(&self) -> Vec<Arc<Host>> {
        self.of_name(|Hosts { left: Left(left), .. }| {
            left.iter().filter(|host| host.is_used()).cloned().collect()
        })
    }

    /// The host at an address, be it one that its name has left.
    pub(super) fn host_at(&self, address: SocketAddr) -> Option<Arc<Host>> {
        let is_there = |host: &&Arc<Host>| host.address() == Some(address);
        match &self.place {
            Place::Host(host) => host.iter().find(is_there).cloned(),
            Place::Name { .. } => self.of_name(|Hosts { all, left: Left(left), .. }| {
                all.iter().chain(left).find(is_there).cloned()
            }),
        }
    }

    /// Of its name, the hosts by the newest answer.
    fn of_name<T: Default>(&self, look: impl FnOnce(&Hosts) -> T) -> T {
        let Place::Name { name, port, hosts } = &self.place else { return T::default() };
        let mut hosts = hosts.lock().unwrap_or_else(PoisonError::into_inner);
        hosts.follow(&name.known(), *port);
        look(&hosts)
    }

    /// Whether connections may go there: a name that points nowhere yet is worth a try.
    pub fn is_good(&self) -> bool {
        let hosts = self.hosts();
        hosts.is_empty() || hosts.iter().any(|host| host.is_good())
    }

    /// Whether it is a name that nobody knows, or has for long said anything of.
    pub(super) fn is_lost(&self) -> bool {
        self.name().is_some_and(|name| name.is_lost())
    }

    pub(super) fn has_good_host(&self) -> bool {
        self.hosts().iter().any(|host| host.is_good())
    }

    /// What it gets of its weight, in [`STEPS`], by the best of its hosts.
    pub(super) fn share(&self, slow_start: Duration) -> u32 {
        if slow_start.is_zero() {
            return STEPS;
        }
        let now = Instant::now();
        let hosts = self.hosts();
        let good = hosts.iter().filter(|host| host.is_good());
        good.map(|host| host.health().share(slow_start, now)).max().unwrap_or(STEPS)
    }

    /// Where to connect, in the order to try it: all that is good. Only a name that has never resolved makes
    /// this wait.
    pub(super) async fn reach(&self, source: Option<&Source>) -> anyhow::Result<Vec<Arc<Host>>> {
        let name = match &self.place {
            Place::Host(host) => return Ok(host.to_vec()),
            Place::Name { name, .. } => name,
        };
        name.addresses().await?;
        let hosts = self.hosts();
        let mut good: Vec<_> = hosts.iter().filter(|host| host.is_good()).cloned().collect();
        if good.is_empty() {
            // They became so since this endpoint was chosen.
            good = hosts.to_vec();
        }
        if let Some(source) = source {
            order_for(source, &mut good);
        } else if !good.is_empty() {
            let first = self.turn.fetch_add(1, Ordering::Relaxed) % good.len();
            good.rotate_left(first);
        }
        Ok(alternate_families(good))
    }

    /// The name it goes by, if it has one that is asked for.
    pub fn name(&self) -> Option<&Arc<Name>> {
        match &self.place {
            Place::Host(_) => None,
            Place::Name { name, .. } => Some(name),
        }
    }

    /// What is known of where it is, for people.
    pub fn known(&self) -> String {
        self.name().map(ToString::to_string).unwrap_or_default()
    }
}

/// Orders hosts as all connections of a source take them.
pub fn order_for(source: &Source, hosts: &mut [Arc<Host>]) {
    let source = source.hash();
    let score = |host: &Arc<Host>| rank(source, &host.at.to_string(), 1.0);
    hosts.sort_by(|left, right| score(right).total_cmp(&score(left)));
}

impl Hosts {
    /// Makes them of this answer, with their own ports unless there is one for all.
    fn follow(&mut self, answer: &Arc<[SocketAddr]>, port: Option<u16>) {
        if self.answer == *answer {
            return;
        }
        let mut before = std::mem::take(&mut self.all).to_vec();
        let mut known = |at: &At| {
            let stays = before.iter().position(|host| host.at == *at);
            stays.map(|index| before.swap_remove(index)).or_else(|| self.left.recall(at))
        };
        let all = answer.iter().map(|it| {
            let at = At::Tcp(SocketAddr::new(it.ip(), port.unwrap_or(it.port())));
            known(&at).unwrap_or_else(|| Host::new(at))
        });
        self.all = all.collect();
        self.left.remember(before);
        self.answer = Arc::clone(answer);
    }
}

impl Left {
    fn remember(&mut self, hosts: Vec<Arc<Host>>) {
        self.0.extend(hosts);
        if self.0.len() > MOST_LEFT {
            self.0.retain(|host| host.is_used() || !host.is_good());
            self.0.drain(..self.0.len().saturating_sub(MOST_LEFT));
        }
    }

    /// One that returns is as it was.
    fn recall(&mut self, at: &At) -> Option<Arc<Host>> {
        let index = self.0.iter().position(|host| host.at == *at)?;
        let host = self.0.remove(index);
        host.learn(Health::has_returned);
        Some(host)
    }
}

impl Lease {
    pub(super) fn new(endpoint: &Arc<Endpoint>) -> Self {
        endpoint.active.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(endpoint))
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

//! An upstream as it runs: its endpoints, where they are now, how they are, and how the next one is chosen.

pub mod balance;
pub mod circuit;
pub mod dns;
pub mod endpoint;
pub mod health;
pub mod host;
pub mod lookup;
mod standing;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use crate::config;
use balance::{Balancer, Source};
use circuit::Circuit;
use dns::Names;
pub use endpoint::{Endpoint, Lease};
use health::{Fault, Health};
use host::Host;
use standing::Standing;

/// A service and the ways to reach it.
#[derive(Debug)]
pub struct Upstream {
    pub name: Arc<str>,
    pub connect: config::Connect,
    meant: Arc<config::Upstream>,
    endpoints: Vec<Arc<Endpoint>>,
    balancer: Balancer,
    /// Told when hosts become good or bad.
    changes: Arc<watch::Sender<()>>,
    /// Whether another one is in its place. Who takes hosts out must hold it: to see who else is out.
    retired: Mutex<bool>,
    /// Hosts that somebody should find out about.
    troubled: Mutex<Vec<Arc<Host>>>,
    pub trouble: Notify,
}

impl Upstream {
    /// In the place of the one before it, if there was one: endpoints that both have go on.
    pub fn new(
        meant: &Arc<config::Upstream>,
        before: Option<&Self>,
        names: &mut Names,
    ) -> Arc<Self> {
        let known: HashMap<_, _> = before.map_or_else(HashMap::new, |before| {
            let meant = before.meant.endpoints.iter().map(|endpoint| &endpoint.target);
            meant.zip(&before.endpoints).collect()
        });
        let same_dns = before.is_some_and(|before| before.meant.dns == meant.dns);
        let endpoints = meant.endpoints.iter().map(|endpoint| match known.get(&endpoint.target) {
            Some(before) if same_dns && before.weight() == u32::from(endpoint.weight.get()) => {
                Arc::clone(before)
            }
            before => Arc::new(Endpoint::new(endpoint, meant, before.copied(), names)),
        });
        let endpoints = endpoints.collect::<Vec<_>>();
        let in_use = before.and_then(|before| {
            let target = &before.meant.endpoints[before.balancer.in_use()?].target;
            meant.endpoints.iter().position(|endpoint| endpoint.target == *target)
        });
        Arc::new(Self {
            name: Arc::clone(&meant.name),
            connect: meant.connect,
            balancer: Balancer::new(meant.balance, endpoints.len(), in_use.unwrap_or(0)),
            meant: Arc::clone(meant),
            endpoints,
            changes: names.changes_of_all(),
            retired: Mutex::default(),
            troubled: Mutex::default(),
            trouble: Notify::new(),
        })
    }

    /// Its hosts are its business from now on, and nobody else's: what is out because of rules that are no more
    /// comes back, as does all if all is out now. The rest is seen to by those who look after this one.
    pub fn take_over(&self) {
        for host in self.endpoints.iter().flat_map(|endpoint| endpoint.remembered()) {
            host.learn(|health| self.forget_rules_that_are_gone(health));
        }
        self.keep_one();
    }

    fn forget_rules_that_are_gone(&self, health: &mut Health) {
        if self.meant.health.is_none() {
            health.unchecked();
        }
        if self.meant.eject.is_none() && health.is_ejected() {
            health.readmit(Instant::now());
        }
    }

    /// As it was configured.
    pub fn meant(&self) -> &Arc<config::Upstream> {
        &self.meant
    }

    pub fn endpoints(&self) -> &[Arc<Endpoint>] {
        &self.endpoints
    }

    /// All addresses that are known now.
    pub fn hosts(&self) -> Vec<Arc<Host>> {
        self.endpoints.iter().flat_map(|endpoint| endpoint.hosts().to_vec()).collect()
    }

    /// Addresses that names have left while there are connections to them.
    pub fn left(&self) -> Vec<Arc<Host>> {
        self.endpoints.iter().flat_map(|endpoint| endpoint.left()).collect()
    }

    /// Whether an endpoint is known to be healthy. One that is to be checked, and was not yet, is not.
    pub fn is_known_healthy(&self) -> bool {
        let checked = |host: &Host| self.meant.health.is_none() || host.health().is_checked();
        self.hosts().iter().any(|host| host.is_good() && checked(host))
    }

    /// The next endpoint for a connection that has `tried` some in vain; `None` when none is left that is
    /// good.
    pub fn choose(
        &self,
        tried: &[usize],
        source: &Source,
        circuit: Option<&Circuit>,
    ) -> Option<(usize, Lease)> {
        let index = self.balancer.choose(&Standing::new(self, tried, circuit), source)?;
        Some((index, Lease::new(&self.endpoints[index])))
    }

    /// Where an endpoint is, for a connection that has `tried` others in vain. Only a name that was never answered
    /// makes this wait, and not for long when there is another endpoint to try.
    pub async fn reach(
        &self,
        endpoint: &Endpoint,
        tried: &[usize],
        source: &Source,
    ) -> Result<Vec<Arc<Host>>> {
        let decides = matches!(self.balancer, Balancer::SourceHash).then_some(source);
        let mut hosts = tokio::select! {
            biased;
            hosts = endpoint.reach(decides) => hosts?,
            () = self.is_better_elsewhere(endpoint, tried) => bail!("its name is not resolved yet"),
        };
        if self.meant.eject.is_some() {
            // Asked once a host: it changes with time, and an order that changes while it is made is none.
            hosts.sort_by_cached_key(|host| host.is_passed_over());
        }
        Ok(hosts)
    }

    /// Waits until nobody has said for long where that is, and another one is known.
    async fn is_better_elsewhere(&self, endpoint: &Endpoint, tried: &[usize]) {
        if let Some(name) = endpoint.name() {
            name.overdue().await;
        }
        let mut changes = self.changes();
        while !self.knows_another(tried) && changes.changed().await.is_ok() {}
    }

    /// Whether an endpoint that is left to try is known to be somewhere, and good.
    pub fn knows_another(&self, tried: &[usize]) -> bool {
        Standing::new(self, tried, None).has_known()
    }

    /// The endpoints of which each is taken only when those before it are not good, for those who cannot
    /// ask for every connection; `None` where that depends on more than their health.
    pub fn order(&self) -> Option<Vec<usize>> {
        self.balancer.order(&Standing::new(self, &[], None))
    }

    /// What a host gets of its endpoint's weight, in [`health::STEPS`].
    pub fn share(&self, host: &Host) -> u32 {
        host.health().share(self.slow_start(), Instant::now())
    }

    /// For how long a host that is back does not get its full share.
    pub fn slow_start(&self) -> Duration {
        self.meant.health.as_ref().map_or(Duration::ZERO, |health| health.slow_start)
    }

    /// A host could not be reached.
    pub fn unreached(&self, host: &Arc<Host>, why: &str) {
        self.blame(host, Fault::Unreached, why);
        if self.may_eject() {
            self.have_tended(host);
        }
    }

    /// A connection to a host was reset before it had brought a byte.
    pub fn reset_early(&self, host: &Arc<Host>) {
        self.blame(host, Fault::EarlyReset, "connections are reset before they bring a byte");
    }

    /// A host was reached.
    pub fn reached(&self, host: &Host) {
        if host.is_blamed() {
            host.learn(|health| health.clear(Fault::Unreached));
            if self.holds() {
                self.changes.send_replace(());
            }
        }
    }

    /// A connection to a host has brought bytes, or ended in order.
    pub fn kept(&self, host: &Host) {
        if host.is_blamed() {
            host.learn(|health| health.clear(Fault::EarlyReset));
        }
    }

    fn blame(&self, host: &Arc<Host>, fault: Fault, why: &str) {
        let eject = self.meant.eject.as_ref();
        // Failures that take as long as they may are still in a row.
        let memory = 2 * (eject.map_or(Duration::ZERO, |it| it.lasting) + self.connect.timeout);
        let blame = |health: &mut Health| health.blame(fault, memory, Instant::now());
        let (count, _) = host.learn(blame);
        if fault == Fault::Unreached && count == 1 && self.holds() {
            self.changes.send_replace(());
        }
        if let Some(eject) = eject
            && count >= eject.consecutive_failures.get()
            && self.eject(host, eject, why)
        {
            self.have_tended(host);
        }
    }

    /// Whether connections wait while there is nowhere to go, which only a listener can have them do.
    pub fn holds(&self) -> bool {
        !self.connect.hold.is_zero()
    }

    /// Takes a host out, if enough are left then.
    fn eject(&self, host: &Arc<Host>, eject: &config::Eject, why: &str) -> bool {
        let retired = self.retired();
        let hosts = self.hosts();
        // One that its name has left is no loss.
        let has_left = !hosts.iter().any(|it| Arc::ptr_eq(it, host));
        let out = hosts.iter().filter(|it| !it.is_good()).count() + 1;
        let allowed = has_left
            || out < hosts.len() && out * 100 <= hosts.len() * usize::from(eject.max_percent);
        if *retired || !host.is_good() || !allowed {
            return false;
        }
        let (lasting, _) = host.learn(|health| health.eject(why, eject.lasting, Instant::now()));
        let has_it = |it: &&Arc<Endpoint>| it.hosts().iter().any(|it| Arc::ptr_eq(it, host));
        self.endpoints.iter().filter(has_it).for_each(|endpoint| endpoint.count_ejection());
        let lasting = humantime::format_duration(lasting);
        warn!(upstream = %self.name, host = %host.at, "ejected for {lasting}: {why}");
        self.changes.send_replace(());
        true
    }

    /// Readmits all if all are out, as after an answer or a configuration without the one that was not.
    pub fn keep_one(&self) {
        // Nobody takes one out meanwhile.
        let _retired = self.retired();
        let hosts = self.hosts();
        if hosts.iter().all(|host| host.is_ejected()) {
            hosts.iter().for_each(|host| self.readmit(host, "no other is left"));
        }
    }

    /// Another one is in its place, whose business hosts are from now on.
    pub fn retire(&self) {
        *self.retired() = true;
    }

    fn retired(&self) -> MutexGuard<'_, bool> {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there can be anything left when a host is taken out.
    fn may_eject(&self) -> bool {
        self.meant.eject.is_some()
            && (self.endpoints.len() > 1 || self.endpoints[0].hosts().len() > 1)
    }

    /// An ejected host still does not work.
    pub fn keep_ejected(&self, host: &Host) {
        if let Some(eject) = &self.meant.eject {
            host.learn(|health| health.keep_ejected(eject.lasting, Instant::now()));
        }
    }

    /// An ejected host works again, or one that was blamed works after all.
    pub fn readmit(&self, host: &Host, why: &str) {
        if host.learn(|health| health.readmit(Instant::now())).1 {
            info!(upstream = %self.name, host = %host.at, "back: {why}");
            self.changes.send_replace(());
        }
    }

    /// A check has come to its end.
    pub fn checked(&self, host: &Host, rules: &config::Health, found: Result<(), String>) {
        let retired = self.retired();
        if *retired {
            return;
        }
        let (_, changed) = host.learn(|health| match &found {
            Ok(()) => health.passed(rules.rise.get(), Instant::now()),
            Err(why) => health.failed(rules.fall.get(), why),
        });
        if changed {
            match found {
                Ok(()) => info!(upstream = %self.name, host = %host.at, "up: its checks pass"),
                Err(why) => warn!(upstream = %self.name, host = %host.at, "down: {why}"),
            }
            self.changes.send_replace(());
        }
    }

    /// Whose address that is, or was. Of several, such as names of one server, it is that of one that is not out:
    /// nobody is led to the others.
    pub fn host_at(&self, address: SocketAddr) -> Option<(&Arc<Endpoint>, Arc<Host>)> {
        let mut all = self.endpoints.iter().filter_map(|it| Some((it, it.host_at(address)?)));
        let first = all.next()?;
        if first.1.is_good() {
            return Some(first);
        }
        all.find(|(_, host)| host.is_good()).or(Some(first))
    }

    /// Told when hosts may have become good or bad.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// The shares of hosts that have come back have grown.
    pub fn shares_have_changed(&self) {
        self.changes.send_replace(());
    }

    fn have_tended(&self, host: &Arc<Host>) {
        let mut troubled = self.troubled();
        if !troubled.iter().any(|it| Arc::ptr_eq(it, host)) {
            troubled.push(Arc::clone(host));
            self.trouble.notify_one();
        }
    }

    /// The hosts that somebody should find out about, for that somebody.
    pub fn take_troubled(&self) -> Vec<Arc<Host>> {
        std::mem::take(&mut *self.troubled())
    }

    fn troubled(&self) -> MutexGuard<'_, Vec<Arc<Host>>> {
        self.troubled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;

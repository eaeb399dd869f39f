//! An upstream as it runs: its endpoints, where they are now, and how the next one is chosen.

pub mod balance;
pub mod dns;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::config;
use balance::Balancer;
use dns::{Name, Names};

/// A service and the ways to reach it.
#[derive(Debug)]
pub struct Upstream {
    pub name: Arc<str>,
    pub connect: config::Connect,
    meant: Arc<config::Upstream>,
    endpoints: Vec<Arc<Endpoint>>,
    balancer: Balancer,
}

/// One place a service is reached at.
#[derive(Debug)]
pub struct Endpoint {
    label: Arc<str>,
    weight: u32,
    place: Place,
    /// Goes on when the weight is changed.
    active: Arc<AtomicU32>,
    /// Which of a name's addresses is tried first; moves on so that all are used.
    turn: AtomicUsize,
}

#[derive(Debug)]
enum Place {
    Address(SocketAddr),
    Unix(PathBuf),
    Name { name: Arc<Name>, port: u16 },
}

/// Where an endpoint can be reached right now.
#[derive(Debug, Clone)]
pub enum Reach {
    /// In the order to try them.
    Tcp(Vec<SocketAddr>),
    Unix(PathBuf),
}

/// One connection's share of an endpoint, given back when dropped.
#[derive(Debug)]
pub struct Lease(Arc<Endpoint>);

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
        Arc::new(Self {
            name: Arc::clone(&meant.name),
            connect: meant.connect,
            balancer: Balancer::new(meant.balance, &endpoints),
            meant: Arc::clone(meant),
            endpoints,
        })
    }

    /// As it was configured.
    pub fn meant(&self) -> &Arc<config::Upstream> {
        &self.meant
    }

    pub fn endpoints(&self) -> &[Arc<Endpoint>] {
        &self.endpoints
    }

    /// The next endpoint for a connection that has `tried` some in vain; `None` when none is left.
    pub fn choose(&self, tried: &[usize]) -> Option<(usize, Lease)> {
        let index = self.balancer.choose(&self.endpoints, tried)?;
        Some((index, Lease::new(&self.endpoints[index])))
    }
}

impl Endpoint {
    fn new(
        meant: &config::Endpoint,
        upstream: &config::Upstream,
        before: Option<&Arc<Self>>,
        names: &mut Names,
    ) -> Self {
        let place = match &meant.target {
            config::Target::Address(address) => Place::Address(*address),
            config::Target::Unix(path) => Place::Unix(path.clone()),
            config::Target::Name { host, port } => {
                Place::Name { name: names.get(host, upstream.dns), port: *port }
            }
        };
        Self {
            label: meant.target.to_string().into(),
            weight: u32::from(meant.weight.get()),
            place,
            active: before.map(|before| Arc::clone(&before.active)).unwrap_or_default(),
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

    /// Where to connect. Only a name that has never resolved makes this wait.
    pub async fn reach(&self) -> anyhow::Result<Reach> {
        Ok(match &self.place {
            Place::Address(address) => Reach::Tcp(vec![*address]),
            Place::Unix(path) => Reach::Unix(path.clone()),
            Place::Name { name, port } => {
                let addresses = name.addresses().await?;
                let first = self.turn.fetch_add(1, Ordering::Relaxed) % addresses.len();
                let mut order = addresses.to_vec();
                order.rotate_left(first);
                Reach::Tcp(
                    dns::alternate_families(order)
                        .into_iter()
                        .map(|address| SocketAddr::new(address, *port))
                        .collect(),
                )
            }
        })
    }

    /// The TCP addresses it is known to be reached at now.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        match &self.place {
            Place::Address(address) => vec![*address],
            Place::Unix(_) => Vec::new(),
            Place::Name { name, port } => {
                let known = name.known();
                known.iter().map(|address| SocketAddr::new(*address, *port)).collect()
            }
        }
    }

    /// The name it goes by, if it has one that is asked for.
    pub fn name(&self) -> Option<&Arc<Name>> {
        match &self.place {
            Place::Address(_) | Place::Unix(_) => None,
            Place::Name { name, .. } => Some(name),
        }
    }

    /// What is known of where it is, for people.
    pub fn known(&self) -> String {
        match &self.place {
            Place::Address(_) | Place::Unix(_) => String::new(),
            Place::Name { name, .. } => name.to_string(),
        }
    }
}

impl Lease {
    fn new(endpoint: &Arc<Endpoint>) -> Self {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Resolved;

    fn meant(endpoints: &str, more: &str) -> Arc<config::Upstream> {
        let text = format!(
            "{{version: 1, routes: [{{listen: 1, upstream: u}}], \
             upstreams: {{u: {{endpoints: [{endpoints}]{more}}}}}}}"
        );
        let resolved = Resolved::of_text("c.yaml".as_ref(), text).unwrap();
        Arc::clone(&resolved.config.routes[0].upstream)
    }

    #[test]
    fn endpoints_that_stay_go_on_and_so_do_the_counts_of_those_that_change() {
        let mut names = Names::default();
        let before = Upstream::new(&meant("'10.0.0.1:1', 'db:1'", ""), None, &mut names);
        let leases: Vec<_> = before.endpoints().iter().map(Lease::new).collect();
        let changed = meant("'10.0.0.1:1:7', '10.0.0.9:1', 'db:1'", ", balance: round_robin");
        let after = Upstream::new(&changed, Some(&before), &mut names);
        let [heavier, new, same] = after.endpoints() else { panic!("three endpoints") };
        assert!(Arc::ptr_eq(same, &before.endpoints()[1]));
        assert_eq!((heavier.weight(), heavier.active(), new.active()), (7, 1, 0));
        drop(leases);
        assert_eq!((heavier.active(), same.active()), (0, 0));
    }
}

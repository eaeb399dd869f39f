//! One address of an endpoint, and how it is.

use std::fmt;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::health::Health;

/// An address that connections can go to.
#[derive(Debug)]
pub struct Host {
    pub at: At,
    health: Mutex<Health>,
    /// What the health says, for those on the hot path.
    good: AtomicBool,
    /// Whether connections have spoken against it, so that those that speak for it are news.
    blamed: AtomicBool,
    /// How many use it.
    users: AtomicU32,
}

/// Whoever has connections to a host uses it, until dropped.
#[derive(Debug)]
pub struct Used(Arc<Host>);

/// Where that is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum At {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Host {
    pub fn new(at: At) -> Arc<Self> {
        Arc::new(Self {
            at,
            health: Mutex::default(),
            good: AtomicBool::new(true),
            blamed: AtomicBool::new(false),
            users: AtomicU32::new(0),
        })
    }

    pub fn address(&self) -> Option<SocketAddr> {
        match self.at {
            At::Tcp(address) => Some(address),
            At::Unix(_) => None,
        }
    }

    /// Whether connections may go there.
    pub fn is_good(&self) -> bool {
        self.good.load(Ordering::Relaxed)
    }

    pub fn is_blamed(&self) -> bool {
        self.blamed.load(Ordering::Relaxed)
    }

    /// Whether it could not be reached a moment ago.
    pub fn is_passed_over(&self) -> bool {
        self.is_blamed() && self.health().is_passed_over(Instant::now())
    }

    pub fn is_used(&self) -> bool {
        self.users.load(Ordering::Relaxed) > 0
    }

    pub fn is_ejected(&self) -> bool {
        self.health().is_ejected()
    }

    /// How much is left of its ejection; `None` if it is not ejected.
    pub fn ejected_for(&self) -> Option<Duration> {
        self.health().ejected_for(Instant::now())
    }

    /// How it is.
    pub fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is known of it, and says whether that makes it good or bad.
    pub(super) fn learn<T>(&self, news: impl FnOnce(&mut Health) -> T) -> (T, bool) {
        let mut health = self.health();
        let told = news(&mut health);
        self.blamed.store(health.is_blamed(), Ordering::Relaxed);
        let good = health.is_good();
        (told, self.good.swap(good, Ordering::Relaxed) != good)
    }
}

impl Used {
    pub fn new(host: &Arc<Host>) -> Self {
        host.users.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(host))
    }
}

impl Deref for Used {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.0
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Alternates the families, beginning with that of the first address, so that a family that does not
/// work here costs one step.
pub fn alternate_families(hosts: Vec<Arc<Host>>) -> Vec<Arc<Host>> {
    let is_ipv4 = |host: &Arc<Host>| host.address().is_some_and(|it| it.is_ipv4());
    let Some(first) = hosts.first().map(is_ipv4) else { return hosts };
    let (same, other): (Vec<_>, Vec<_>) =
        hosts.into_iter().partition(|host| is_ipv4(host) == first);
    let (mut same, mut other) = (same.into_iter(), other.into_iter());
    let mut order = Vec::with_capacity(same.len() + other.len());
    while same.len() + other.len() > 0 {
        order.extend(same.next());
        order.extend(other.next());
    }
    order
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_alternate_and_none_is_lost() {
        let addresses = ["[::1]:1", "[::2]:1", "127.0.0.1:1", "[::3]:1"];
        let hosts = addresses.map(|text| Host::new(At::Tcp(text.parse().unwrap())));
        let order = alternate_families(hosts.to_vec()).into_iter().map(|it| it.at.to_string());
        assert_eq!(order.collect::<Vec<_>>(), ["[::1]:1", "127.0.0.1:1", "[::2]:1", "[::3]:1"]);
        assert!(alternate_families(Vec::new()).is_empty());
    }
}

//! How many connections of a route one address may have at a time, whoever carries them.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::host::{At, Host};
use crate::config::Limits;

/// Connections at a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Those that are open or on their way.
    pub active: u32,
    /// Those that are on their way.
    pub pending: u32,
}

/// What is open to each address, as far as we carry it. It goes by a route's name, whatever its configuration.
#[derive(Debug, Default)]
pub struct Held {
    by_host: Mutex<HashMap<At, Counts>>,
    past_us: OnceLock<PastUs>,
}

/// Told how many connections to an address are ours, tells how many others there are.
struct PastUs(Box<Exchange>);

type Exchange = dyn Fn(&At, Counts) -> Counts + Send + Sync;

/// The limits of a route, and what counts for them.
#[derive(Debug, Clone)]
pub struct Circuit {
    limits: Limits,
    held: Arc<Held>,
}

/// A connection's place at an address, given back when dropped.
#[derive(Debug)]
pub struct Place {
    held: Arc<Held>,
    at: At,
    pending: bool,
}

/// Nobody could be asked, because all have as many connections as they may.
#[derive(Debug)]
pub struct Full;

impl Circuit {
    /// None if there are no limits.
    pub fn new(limits: Limits, held: &Arc<Held>) -> Option<Self> {
        (limits != Limits::default()).then(|| Self { limits, held: Arc::clone(held) })
    }

    /// Whether one more would be too many.
    pub fn is_full(&self, host: &Host) -> bool {
        !self.allows(self.held.of(&host.at))
    }

    /// A place for one more, that is on its way.
    pub fn begin(&self, host: &Host) -> Option<Place> {
        self.held.change(&host.at, |counts, theirs| {
            let allowed = self.allows(counts.and(theirs));
            allowed.then(|| {
                *counts = Counts { active: counts.active + 1, pending: counts.pending + 1 }
            })
        })?;
        Some(Place { held: Arc::clone(&self.held), at: host.at.clone(), pending: true })
    }

    fn allows(&self, counts: Counts) -> bool {
        let below = |count, limit: Option<NonZeroU32>| limit.is_none_or(|it| count < it.get());
        below(counts.active, self.limits.connections) && below(counts.pending, self.limits.pending)
    }
}

impl Place {
    /// It has arrived.
    pub fn arrive(&mut self) {
        if std::mem::take(&mut self.pending) {
            self.held.change(&self.at, |counts, _| counts.pending -= 1);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let pending = u32::from(self.pending);
        self.held.change(&self.at, |counts, _| {
            counts.active -= 1;
            counts.pending -= pending;
        });
    }
}

impl Held {
    /// Has connections counted that do not come to us, by somebody who wants to know of ours. Set once.
    pub fn count_past_us(&self, exchange: impl Fn(&At, Counts) -> Counts + Send + Sync + 'static) {
        let _ = self.past_us.set(PastUs(Box::new(exchange)));
    }

    /// All that there are to an address.
    fn of(&self, at: &At) -> Counts {
        self.change(at, |counts, theirs| counts.and(theirs))
    }

    /// Changes what is ours, knowing what is not, and tells of it.
    fn change<T>(&self, at: &At, change: impl FnOnce(&mut Counts, Counts) -> T) -> T {
        let mut by_host = self.by_host.lock().unwrap_or_else(PoisonError::into_inner);
        let before = by_host.get(at).copied().unwrap_or_default();
        let exchange = |ours| self.past_us.get().map(|PastUs(exchange)| exchange(at, ours));
        let mut ours = before;
        let changed = change(&mut ours, exchange(before).unwrap_or_default());
        if ours == Counts::default() {
            by_host.remove(at);
        } else if ours != before {
            by_host.insert(at.clone(), ours);
        }
        if ours != before {
            exchange(ours);
        }
        changed
    }
}

impl Counts {
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            active: self.active.saturating_add(other.active),
            pending: self.pending.saturating_add(other.pending),
        }
    }
}

impl fmt::Debug for PastUs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PastUs")
    }
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("every endpoint has as many connections as per_endpoint allows")
    }
}

impl std::error::Error for Full {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_on_their_way_and_there_with_those_past_us() {
        let host = Host::new(At::Tcp("127.0.0.1:1".parse().unwrap()));
        let held = Arc::new(Held::default());
        let limits = Limits { connections: NonZeroU32::new(3), pending: NonZeroU32::new(1) };
        let circuit = Circuit::new(limits, &held).unwrap();
        let mut first = circuit.begin(&host).unwrap();
        assert!(circuit.is_full(&host), "one is on its way");
        first.arrive();
        let mut second = circuit.begin(&host).unwrap();
        second.arrive();
        assert!(!circuit.is_full(&host));
        held.count_past_us(|_, ours| {
            assert!(ours.active <= 3);
            Counts { active: 1, pending: 0 }
        });
        assert!(circuit.begin(&host).is_none(), "one more is past us");
        drop(first);
        assert!(circuit.begin(&host).is_some());
        drop(second);
        assert!(held.by_host.lock().unwrap().is_empty());
        assert!(Circuit::new(Limits::default(), &held).is_none());
    }
}

//! What of a route goes on when it is changed: its connections, its figures, the tier in force.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use crate::metrics::{Metrics, RouteMetrics};
use crate::tier::Choice;
use crate::upstream::circuit::{Counts, Held};

/// The part of a route that goes by its name, whatever its configuration.
#[derive(Debug)]
pub struct Standing {
    pub metrics: Arc<RouteMetrics>,
    pub(super) choice: RwLock<Choice>,
    /// Connections that we carry: how many, and above them those that are on their way.
    pub(super) counts: AtomicU64,
    /// The same, by address.
    pub(super) held: Arc<Held>,
    /// Whether clients may come that the kernel has made ready for a shortcut.
    pub(super) prepares: AtomicBool,
    /// Whoever makes connections past us: they count for the limit too.
    pub(super) past_us: OnceLock<PastUs>,
}

/// Told how to see how many connections are ours, tells how many others there are.
pub(super) struct PastUs(pub(super) Box<Exchange>);

type Exchange = dyn Fn(&dyn Fn() -> Counts) -> Counts + Send + Sync;

/// Those of all routes there are, and of routes that are gone as long as they have connections.
#[derive(Debug, Default)]
pub struct Standings(Mutex<HashMap<Arc<str>, Arc<Standing>>>);

impl Standings {
    /// That of the route of this name, carried as `choice` says if it is a new one.
    pub fn of(
        &self,
        name: &Arc<str>,
        metrics: &Metrics,
        choice: impl FnOnce() -> Choice,
    ) -> Arc<Standing> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let standing = known.entry(Arc::clone(name)).or_insert_with(|| {
            Arc::new(Standing {
                metrics: Arc::new(metrics.route(name)),
                choice: RwLock::new(choice()),
                counts: AtomicU64::new(0),
                held: Arc::default(),
                prepares: AtomicBool::new(false),
                past_us: OnceLock::new(),
            })
        });
        Arc::clone(standing)
    }

    /// Forgets those that neither a route nor a connection has any more.
    pub fn sweep(&self) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, standing| {
            // Nobody else can come to have one that only we have: it is given out under this lock.
            let used = Arc::strong_count(standing) > 1;
            if !used {
                standing.metrics.forget();
            }
            used
        });
    }
}

impl Standing {
    pub(super) fn past_us(&self) -> Counts {
        let ours = || self.ours();
        self.past_us.get().map(|PastUs(exchange)| exchange(&ours)).unwrap_or_default()
    }

    /// What we carry.
    pub(super) fn ours(&self) -> Counts {
        unpack(self.counts.load(Ordering::Relaxed))
    }

    pub(super) fn active(&self) -> u32 {
        self.ours().and(self.past_us()).active
    }

    /// Takes a place, if both numbers allow it.
    pub(super) fn take_place(&self, allows: impl Fn(Counts) -> bool) -> bool {
        let change = |counts| allows(unpack(counts)).then_some(counts + ACTIVE + PENDING);
        self.counts.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change).is_ok()
    }

    /// One has arrived.
    pub(super) fn arrived(&self) {
        self.counts.fetch_sub(PENDING, Ordering::Relaxed);
    }

    pub(super) fn give_back(&self, pending: bool) {
        let pending = if pending { PENDING } else { 0 };
        self.counts.fetch_sub(ACTIVE + pending, Ordering::Relaxed);
    }
}

/// One connection, and one that is on its way, in [`Standing::counts`].
const ACTIVE: u64 = 1;
const PENDING: u64 = 1 << 32;

fn unpack(counts: u64) -> Counts {
    Counts { active: counts as u32, pending: (counts >> 32) as u32 }
}

impl fmt::Debug for PastUs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PastUs")
    }
}

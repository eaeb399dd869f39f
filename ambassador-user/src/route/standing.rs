//! What of a route goes on when it is changed: its connections, its figures, the tier in force.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use crate::metrics::{Metrics, RouteMetrics};
use crate::tier::Choice;

/// The part of a route that goes by its name, whatever its configuration.
#[derive(Debug)]
pub struct Standing {
    pub metrics: Arc<RouteMetrics>,
    pub(super) choice: RwLock<Choice>,
    pub(super) active: AtomicU32,
    /// Whether clients may come that the kernel has made ready for a shortcut.
    pub(super) prepares: AtomicBool,
    /// Whoever makes connections past us: they count for the limit too.
    pub(super) past_us: OnceLock<PastUs>,
}

/// Told how many connections are ours, tells how many others there are.
pub(super) struct PastUs(pub(super) Box<dyn Fn(&AtomicU32) -> u32 + Send + Sync>);

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
                active: AtomicU32::new(0),
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
    pub(super) fn past_us(&self) -> u32 {
        self.past_us.get().map_or(0, |PastUs(exchange)| exchange(&self.active))
    }

    pub(super) fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed).saturating_add(self.past_us())
    }
}

impl fmt::Debug for PastUs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PastUs")
    }
}

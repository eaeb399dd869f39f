//! Who was hurt when: what excuses a conversation that failed, and nothing else does.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Somebody who takes part in conversations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// One of the servers.
    Server(usize),
    /// One of the ambassadors.
    Ambassador(usize),
}

/// All that has happened.
#[derive(Debug, Default)]
pub(crate) struct Hurts(Mutex<Vec<Hurt>>);

#[derive(Debug)]
struct Hurt {
    part: Part,
    began: Instant,
    ended: Option<Instant>,
}

impl Hurts {
    /// To be called before it happens.
    pub(crate) fn begin(&self, part: Part) {
        self.all().push(Hurt { part, began: Instant::now(), ended: None });
    }

    /// To be called once all is as it was.
    pub(crate) fn end(&self, part: Part) {
        let now = Instant::now();
        self.all().iter_mut().filter(|it| it.part == part).for_each(|it| {
            it.ended.get_or_insert(now);
        });
    }

    /// When one of these was hurt last, in a time that includes some of these moments.
    pub(crate) fn during(
        &self,
        (from, to): (Instant, Instant),
        is_one: impl Fn(Part) -> bool,
    ) -> Option<Instant> {
        let all = self.all();
        let ours = all.iter().filter(|it| is_one(it.part) && it.began <= to);
        ours.filter(|it| it.ended.is_none_or(|ended| ended >= from)).map(|it| it.began).max()
    }

    fn all(&self) -> MutexGuard<'_, Vec<Hurt>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

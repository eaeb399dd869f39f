//! Who was hurt when: what excuses a conversation that failed, and nothing else does.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Something that conversations need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// One of the servers.
    Server(usize),
    /// The way into one of them, on which nobody is refused, and which those who are in need no more.
    Door(usize),
    /// All of the servers: not one is there, beside what is told of each.
    AllServers,
    /// The name server.
    Names,
    /// One of the ambassadors.
    Ambassador(usize),
}

/// All that has happened.
#[derive(Debug, Default)]
pub(crate) struct Hurts(Mutex<Vec<Hurt>>);

/// One of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hurt {
    pub(crate) part: Part,
    pub(crate) began: Instant,
    pub(crate) ended: Option<Instant>,
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

    /// Those of these in a time that includes some of these moments.
    pub(crate) fn during(
        &self,
        (from, to): (Instant, Instant),
        is_one: impl Fn(Part) -> bool,
    ) -> Vec<Hurt> {
        let all = self.all();
        let ours = all.iter().filter(|it| is_one(it.part) && it.began <= to);
        ours.filter(|it| it.ended.is_none_or(|ended| ended >= from)).copied().collect()
    }

    fn all(&self) -> MutexGuard<'_, Vec<Hurt>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hurt {
    /// Who, and when, seen from some moment.
    pub(crate) fn told(&self, since: Instant) -> String {
        let seen = |at: Instant| match at.checked_duration_since(since) {
            Some(after) => after.as_secs_f64(),
            None => -(since - at).as_secs_f64(),
        };
        let ended = self.ended.map_or(f64::INFINITY, seen);
        format!("{:?} {:.1}..{ended:.1} s", self.part, seen(self.began))
    }
}

//! What is known of a host's health: what checks found, and what became of connections. Pure: it is told the
//! time, and decides nothing about other hosts.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A host that has come back takes its share in so many steps.
pub const STEPS: u32 = 10;
/// An ejection lasts at most so many times as long as the first.
const MOST_GROWTH: u32 = 10;
/// For so long a host that could not be reached is passed over where there are others: long enough that of a crowd only
/// the first pays for the attempt, and so short that its failures still add up.
const PASSED_OVER: Duration = Duration::from_millis(20);

/// The health of one host. A new one is taken for healthy: nobody waits for the first check.
#[derive(Debug, Default)]
pub struct Health {
    checks: Checks,
    /// Connects that failed, since one succeeded.
    unreached: Streak,
    /// Connections that were reset before they brought a byte, since one was not.
    resets: Streak,
    ejection: Option<Ejection>,
    /// Since when it is back.
    back: Option<Instant>,
}

#[derive(Debug, Default)]
struct Checks {
    /// Why the last ones failed, once they were enough to tell.
    down: Option<Arc<str>>,
    /// Whether there has been any.
    settled: bool,
    /// Those in a row that speak against what is believed.
    against: u32,
}

#[derive(Debug, Default)]
struct Streak {
    count: u32,
    last: Option<Instant>,
}

#[derive(Debug)]
struct Ejection {
    why: Arc<str>,
    /// None: it has ended, and is kept for the next one, which is to last longer.
    until: Option<Instant>,
    lasting: Duration,
}

/// How a connection can speak against a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Unreached,
    EarlyReset,
}

impl Health {
    /// Whether connections may go there.
    pub fn is_good(&self) -> bool {
        self.checks.down.is_none() && !self.is_ejected()
    }

    pub fn is_ejected(&self) -> bool {
        self.ejection.as_ref().is_some_and(|it| it.until.is_some())
    }

    /// How much is left of its ejection; `None` if it is not ejected.
    pub fn ejected_for(&self, now: Instant) -> Option<Duration> {
        let until = self.ejection.as_ref()?.until?;
        Some(until.saturating_duration_since(now))
    }

    /// A check has passed; `rise` of them in a row bring it back, or the first one after an absence.
    pub fn passed(&mut self, rise: u32, now: Instant) {
        let settled = std::mem::replace(&mut self.checks.settled, true);
        if self.checks.down.is_none() {
            self.checks.against = 0;
            return;
        }
        self.checks.against += 1;
        if self.checks.against >= rise || !settled {
            self.checks = Checks { settled: true, ..Checks::default() };
            self.back = Some(now);
        }
    }

    /// A check has failed; `fall` of them in a row take it out, or the very first one.
    pub fn failed(&mut self, fall: u32, why: &str) {
        if self.checks.down.is_some() {
            self.checks.down = Some(why.into());
            self.checks.against = 0;
            return;
        }
        self.checks.against += 1;
        if self.checks.against >= fall || !self.checks.settled {
            self.checks.down = Some(why.into());
            self.checks.against = 0;
        }
        self.checks.settled = true;
    }

    /// Whether the last check speaks against a host that is not down yet.
    pub fn is_doubted(&self) -> bool {
        self.checks.down.is_none() && self.checks.against > 0
    }

    /// It was away, unchecked: what is known of it stands until the next check, which is believed at once.
    pub fn has_returned(&mut self) {
        self.checks.settled = false;
    }

    /// Whether a check has passed or failed yet.
    pub fn is_checked(&self) -> bool {
        self.checks.settled
    }

    /// It is not checked any more.
    pub fn unchecked(&mut self) {
        self.checks = Checks::default();
    }

    /// Says how many connections in a row have spoken against it; older ones than `memory` do not count.
    pub fn blame(&mut self, fault: Fault, memory: Duration, now: Instant) -> u32 {
        let streak = self.streak(fault);
        if streak.last.is_some_and(|last| now.duration_since(last) > memory) {
            streak.count = 0;
        }
        streak.last = Some(now);
        streak.count = streak.count.saturating_add(1);
        streak.count
    }

    /// A connection has spoken for it.
    pub fn clear(&mut self, fault: Fault) {
        *self.streak(fault) = Streak::default();
    }

    /// Whether connections have spoken against it lately.
    pub fn is_blamed(&self) -> bool {
        self.unreached.count + self.resets.count > 0
    }

    /// Whether the last connect to it failed.
    pub fn is_unreached(&self) -> bool {
        self.unreached.count > 0
    }

    /// Whether that was a moment ago.
    pub fn is_passed_over(&self, now: Instant) -> bool {
        let failed = self.unreached.last.filter(|_| self.is_unreached());
        failed.is_some_and(|at| now.saturating_duration_since(at) < PASSED_OVER)
    }

    /// Takes it out for `first`, or longer if it has been taken out shortly before. Says for how long.
    pub fn eject(&mut self, why: &str, first: Duration, now: Instant) -> Duration {
        let lasting = match &self.ejection {
            // It had no time to prove itself.
            Some(before) if self.back.is_some_and(|back| now < back + before.lasting) => {
                (before.lasting * 2).min(first * MOST_GROWTH)
            }
            _ => first,
        };
        self.ejection = Some(Ejection { why: why.into(), until: Some(now + lasting), lasting });
        lasting
    }

    /// It still does not work: stays out, for longer.
    pub fn keep_ejected(&mut self, first: Duration, now: Instant) {
        if let Some(ejection) = &mut self.ejection {
            ejection.lasting = (ejection.lasting * 2).min(first * MOST_GROWTH);
            ejection.until = Some(now + ejection.lasting);
        }
    }

    pub fn readmit(&mut self, now: Instant) {
        if let Some(ejection) = &mut self.ejection {
            ejection.until = None;
        }
        self.unreached = Streak::default();
        self.resets = Streak::default();
        self.back = Some(now);
    }

    /// Its share of what it gets in the end, in [`STEPS`]: one that has come back begins with little.
    pub fn share(&self, slow_start: Duration, now: Instant) -> u32 {
        let Some(back) = self.back else { return STEPS };
        let passed = now.saturating_duration_since(back);
        if slow_start.is_zero() || passed >= slow_start {
            return STEPS;
        }
        let steps = passed.as_nanos() * u128::from(STEPS) / slow_start.as_nanos();
        u32::try_from(steps).unwrap_or(STEPS).max(1)
    }

    fn streak(&mut self, fault: Fault) -> &mut Streak {
        match fault {
            Fault::Unreached => &mut self.unreached,
            Fault::EarlyReset => &mut self.resets,
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(why) = &self.checks.down {
            return write!(f, "down: {why}");
        }
        match &self.ejection {
            Some(Ejection { why, until: Some(_), .. }) => write!(f, "ejected: {why}"),
            _ => f.write_str("healthy"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_secs(30);

    #[test]
    fn checks_take_it_out_and_bring_it_back_by_their_numbers() {
        let (mut health, now) = (Health::default(), Instant::now());
        health.passed(2, now);
        for _ in 0..2 {
            health.failed(3, "refused");
            assert!(health.is_good() && health.is_doubted());
        }
        health.failed(3, "refused");
        assert_eq!(health.to_string(), "down: refused");
        assert!(!health.is_doubted());
        health.passed(2, now);
        health.failed(3, "reset");
        health.passed(2, now);
        assert_eq!(health.to_string(), "down: reset");
        health.passed(2, now);
        assert!(health.is_good());
    }

    #[test]
    fn the_first_check_of_all_is_believed_at_once() {
        let mut health = Health::default();
        health.failed(3, "refused");
        assert!(!health.is_good());
        health.has_returned();
        assert!(!health.is_good());
        health.passed(3, Instant::now());
        assert!(health.is_good());
        health.failed(3, "refused");
        assert!(health.is_good());
        health.has_returned();
        health.failed(3, "refused");
        assert!(!health.is_good());
        health.unchecked();
        assert!(health.is_good());
    }

    #[test]
    fn only_faults_in_a_row_and_of_late_count() {
        let (mut health, now) = (Health::default(), Instant::now());
        let blame = |health: &mut Health, at| health.blame(Fault::Unreached, FIRST, at);
        assert_eq!(blame(&mut health, now), 1);
        assert_eq!(health.blame(Fault::EarlyReset, FIRST, now), 1);
        assert_eq!(blame(&mut health, now), 2);
        health.clear(Fault::Unreached);
        assert_eq!(blame(&mut health, now), 1);
        assert_eq!(health.blame(Fault::EarlyReset, FIRST, now), 2);
        assert_eq!(blame(&mut health, now + FIRST + FIRST), 1);
    }

    #[test]
    fn it_is_passed_over_for_a_moment_after_a_connect_that_failed() {
        let (mut health, now) = (Health::default(), Instant::now());
        health.blame(Fault::EarlyReset, FIRST, now);
        assert!(!health.is_passed_over(now));
        health.blame(Fault::Unreached, FIRST, now);
        assert!(health.is_passed_over(now) && health.is_good());
        assert!(!health.is_passed_over(now + PASSED_OVER));
        health.clear(Fault::Unreached);
        assert!(!health.is_passed_over(now));
    }

    #[test]
    fn each_ejection_lasts_longer_unless_it_had_time_to_prove_itself() {
        let (mut health, now) = (Health::default(), Instant::now());
        assert_eq!(health.eject("refused", FIRST, now), FIRST);
        assert!(!health.is_good());
        health.keep_ejected(FIRST, now + FIRST);
        assert_eq!(health.ejected_for(now + FIRST), Some(FIRST * 2));
        let back = now + FIRST * 3;
        health.readmit(back);
        assert!(health.is_good() && !health.is_blamed());
        assert_eq!(health.eject("refused", FIRST, back), FIRST * 4);
        (0..9).for_each(|_| health.keep_ejected(FIRST, back));
        assert_eq!(health.ejected_for(back), Some(FIRST * MOST_GROWTH));
        health.readmit(back);
        let later = back + FIRST * MOST_GROWTH;
        assert_eq!(health.eject("refused", FIRST, later), FIRST);
    }

    #[test]
    fn a_host_that_is_back_begins_with_little() {
        let (mut health, now) = (Health::default(), Instant::now());
        assert_eq!(health.share(FIRST, now), STEPS);
        health.readmit(now);
        let shares = [0, 1, 6, 29, 30].map(|s| health.share(FIRST, now + Duration::from_secs(s)));
        assert_eq!(shares, [1, 1, 2, 9, STEPS]);
        assert_eq!(health.share(Duration::ZERO, now), STEPS);
    }
}

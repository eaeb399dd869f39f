//! Says a repeated thing at most once a second, with the number of times it happened.
#![forbid(unsafe_code)]

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_secs(1);

/// One kind of message that must not fill the log.
#[derive(Debug, Default)]
pub struct Throttle(Mutex<(Option<Instant>, u64)>);

impl Throttle {
    /// Whether to say it now: the number of times it happened since it was last said.
    pub fn say_now(&self) -> Option<u64> {
        self.at(Instant::now())
    }

    fn at(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (said, count) = &mut *state;
        *count += 1;
        if said.is_some_and(|said| now.duration_since(said) < EVERY) {
            return None;
        }
        *said = Some(now);
        Some(std::mem::take(count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_the_first_at_once_and_counts_what_it_kept_to_itself() {
        let throttle = Throttle::default();
        let start = Instant::now();
        assert_eq!(throttle.at(start), Some(1));
        assert_eq!(throttle.at(start), None);
        assert_eq!(throttle.at(start + EVERY / 2), None);
        assert_eq!(throttle.at(start + EVERY), Some(3));
    }
}

//! The places that flows take in the shared arrays.
//!
//! A program that began on a flow may still be at it, on another CPU, when the flow has ended. So a place
//! is not given away again before that has certainly passed.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Programs run for microseconds; a virtual CPU may stand still for longer.
const REST: Duration = Duration::from_secs(1);

/// Places without a flow.
#[derive(Debug)]
pub(super) struct Places {
    unused: std::ops::Range<u32>,
    /// Those given back, the longest-rested first.
    resting: VecDeque<(Instant, u32)>,
}

impl Places {
    pub(super) fn new(count: u32) -> Self {
        Self { unused: 0..count, resting: VecDeque::new() }
    }

    /// A place, unless all are taken or at rest.
    pub(super) fn take(&mut self, now: Instant) -> Option<u32> {
        match self.resting.front() {
            Some((since, _)) if now.duration_since(*since) >= REST => {
                self.resting.pop_front().map(|(_, place)| place)
            }
            _ => self.unused.next(),
        }
    }

    pub(super) fn give_back(&mut self, place: u32, now: Instant) {
        self.resting.push_back((now, place));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_taken_again_only_after_its_rest() {
        let start = Instant::now();
        let mut places = Places::new(2);
        let first = places.take(start).unwrap();
        places.give_back(first, start);
        assert_ne!(places.take(start), Some(first));
        assert_eq!(places.take(start + REST / 2), None);
        assert_eq!(places.take(start + REST), Some(first));
        assert_eq!(places.take(start + REST), None);
    }
}

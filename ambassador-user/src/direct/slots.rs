//! Which route has which place in the kernel's tables.
#![forbid(unsafe_code)]

use std::collections::HashMap;

/// The places of all routes, by the ids of their names.
#[derive(Debug)]
pub(super) struct Slots {
    taken: HashMap<u64, u32>,
    /// Those that can be given out.
    free: Vec<u32>,
}

impl Slots {
    pub(super) fn new(room: u32) -> Self {
        Self { taken: HashMap::new(), free: (0..room).rev().collect() }
    }

    pub(super) fn of(&self, route: u64) -> Option<u32> {
        self.taken.get(&route).copied()
    }

    /// The place of a route, given to it if it has none yet and there is one left.
    pub(super) fn take(&mut self, route: u64) -> Option<u32> {
        if let Some(slot) = self.of(route) {
            return Some(slot);
        }
        let slot = self.free.pop()?;
        self.taken.insert(route, slot);
        Some(slot)
    }

    /// Takes the places back of all routes but these, and tells which those were.
    pub(super) fn keep(&mut self, is_one: impl Fn(u64) -> bool) -> Vec<u32> {
        let gone: Vec<_> = self.taken.extract_if(|route, _| !is_one(*route)).collect();
        let gone: Vec<_> = gone.into_iter().map(|(_, slot)| slot).collect();
        self.free.extend(&gone);
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_keeps_its_place_and_another_gets_what_is_given_back() {
        let mut slots = Slots::new(2);
        let (one, two) = (slots.take(1), slots.take(2));
        assert!(one.is_some() && two.is_some() && one != two);
        assert_eq!((slots.take(1), slots.take(3)), (one, None));
        assert_eq!(slots.keep(|route| route != 1), one.into_iter().collect::<Vec<_>>());
        assert_eq!((slots.take(3), slots.of(1)), (one, None));
    }
}

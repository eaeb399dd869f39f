//! How many routes have room in the kernel, and what those are told that have none.
//!
//! The tables are as large as they were made when the kernel half was loaded. Routes that have a place
//! keep it, so that no reload takes a tier from a route that was not touched.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use ambassador_ebpf::sockmap::MOST_LISTENERS;
use anyhow::Result;

use crate::config::{self, Config, Listen, Tier};
use crate::datapath::tables::MOST_ADDRESSES;
use crate::direct::plan::loopback;
use crate::route::Route;
use crate::tier::Ladder;

/// What works for a route: with room in the kernel, and without it for one tier or both.
#[derive(Debug)]
pub struct Ladders {
    /// With room in neither, in `sockmap`, in `direct`, in both.
    all: [Arc<Ladder>; 4],
    /// Routes that `direct` has room for.
    routes: usize,
}

/// What is left.
struct Room {
    routes: usize,
    addresses: usize,
    clients_of: usize,
}

impl Ladders {
    /// Where `works` works, and `direct` has room for so many routes.
    pub fn new(works: Ladder, routes: u32) -> Self {
        let full = |direct: bool, sockmap: bool| {
            let mut ladder = works.clone();
            if !direct {
                ladder.no_direct.get_or_insert_with(|| {
                    format!(
                        "there is no room: the kernel half was loaded for {routes} routes, on {MOST_ADDRESSES} \
                         addresses at most; restart the ambassador, or `ambassador load` again"
                    )
                });
            }
            if !sockmap {
                ladder.no_sockmap.get_or_insert_with(|| {
                    format!("there is no room: it serves {MOST_LISTENERS} listen addresses")
                });
            }
            Arc::new(ladder)
        };
        let all = [full(false, false), full(false, true), full(true, false), full(true, true)];
        Self { all, routes: routes as usize }
    }

    /// What works for each of these routes, in the place of those `before`.
    pub fn of(&self, routes: &[config::Route], before: &[Arc<Route>]) -> Vec<Arc<Ladder>> {
        let before: HashMap<_, _> = before.iter().map(|route| (&route.name, route)).collect();
        let had = |meant: &config::Route| before.get(&meant.name).map(|it| it.highest().tier);
        let mut room = Room {
            routes: self.routes,
            addresses: MOST_ADDRESSES,
            clients_of: MOST_LISTENERS as usize,
        };
        let mut order: Vec<_> = routes.iter().enumerate().collect();
        // Stable, so that of those that are new the first one is served first.
        order.sort_by_cached_key(|(_, meant)| Reverse(had(meant)));
        let mut ladders = vec![Arc::clone(&self.all[3]); routes.len()];
        for (index, meant) in order {
            ladders[index] = Arc::clone(&self.all[room.take(meant, &self.all)]);
        }
        ladders
    }

    /// Whether every route reaches the tier that is required.
    pub fn satisfy(&self, config: &Config, ladders: &[Arc<Ladder>]) -> Result<()> {
        let Some(required) = config.acceleration.require else { return Ok(()) };
        config
            .routes
            .iter()
            .zip(ladders)
            .try_for_each(|(it, ladder)| ladder.satisfies(it, required))
    }
}

impl Room {
    /// Takes what a route needs, and tells which ladder that leaves it.
    fn take(&mut self, meant: &config::Route, ladders: &[Arc<Ladder>; 4]) -> usize {
        let addresses = meant.listen.iter().map(|it: &Listen| loopback(it).len()).sum();
        let with_room = ladders[3].choose(meant, meant.tier);
        let direct = with_room.tier == Tier::Direct;
        let has_direct = !direct || (self.routes > 0 && self.addresses >= addresses);
        if direct && has_direct {
            self.routes -= 1;
            self.addresses -= addresses;
        }
        let ladder = 2 * usize::from(has_direct) + 1;
        let sockmap = ladders[ladder].choose(meant, meant.tier).relay == Tier::Sockmap;
        let has_sockmap = !sockmap || self.clients_of >= addresses;
        if sockmap && has_sockmap {
            self.clients_of -= addresses;
        }
        2 * usize::from(has_direct) + usize::from(has_sockmap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Resolved;

    fn routes(count: usize) -> Vec<config::Route> {
        let routes: String = (1..=count)
            .map(|n| format!("{{name: r{n}, listen: '127.0.0.1:{n}', upstream: u}},"))
            .collect();
        let text = format!(
            "{{version: 1, routes: [{routes}], upstreams: {{u: {{endpoints: ['10.0.0.1:2']}}}}}}"
        );
        Resolved::of_text("c.yaml".as_ref(), text).unwrap().config.routes
    }

    fn tiers(ladders: &[Arc<Ladder>], routes: &[config::Route]) -> Vec<Tier> {
        ladders.iter().zip(routes).map(|(ladder, it)| ladder.choose(it, it.tier).tier).collect()
    }

    #[test]
    fn routes_beyond_the_room_take_a_lower_tier_and_say_why() {
        let (ladders, routes) = (Ladders::new(Ladder::default(), 2), routes(3));
        let given = ladders.of(&routes, &[]);
        assert_eq!(tiers(&given, &routes), [Tier::Direct, Tier::Direct, Tier::Sockmap]);
        let why = given[2].choose(&routes[2], routes[2].tier).reason();
        assert!(why.contains("was loaded for 2 routes"), "{why}");
    }

    #[test]
    fn sockmap_has_its_own_room() {
        let no_direct = Ladder { no_direct: Some("no".to_owned()), ..Ladder::default() };
        let routes = routes(MOST_LISTENERS as usize + 1);
        let given = Ladders::new(no_direct, 0).of(&routes, &[]);
        let tiers = tiers(&given, &routes);
        assert!(tiers[..tiers.len() - 1].iter().all(|tier| *tier == Tier::Sockmap));
        assert_eq!(tiers.last(), Some(&Tier::Splice));
    }
}

//! The kernel half, tried for somebody who asks whether it works here.

use super::adopted::Adopted;
use super::{Attached, default_instance};
use crate::config::{Acceleration, Cgroup};
use crate::datapath::cgroup;
use crate::datapath::obstacle::{self, Obstacle};
use crate::datapath::pins::Pins;
use crate::datapath::selftest::{self, Check, Extent, Found, Outcome};

/// Tries the kernel half, and leaves nothing behind.
pub fn examine(choice: &Cgroup) -> Result<Found, Obstacle> {
    if let Err(obstacle) = obstacle::to_load() {
        // Somebody else may have loaded it for us.
        return examine_pins().unwrap_or(Err(obstacle));
    }
    let cgroup = cgroup::find(choice).map_err(Obstacle::NoCgroup)?;
    let Attached { cgroup, programs, links, maps, .. } = Attached::to(&cgroup, 1)?;
    selftest::run(&maps, &programs, cgroup, Extent::DOCTOR, Some(links)).map_err(Obstacle::Refused)
}

/// What is pinned here, if anything is; an obstacle if it is another user's, or an ambassador holds it.
fn examine_pins() -> Option<Result<Found, Obstacle>> {
    let pins = match Pins::find(&default_instance().ok()?) {
        Ok(pins) => pins?,
        Err(error) => {
            let error =
                error.context("`ambassador explain` asks the one that runs here, if one does");
            return Some(Err(Obstacle::NotOurs(error)));
        }
    };
    let pinned = match Adopted::from(&pins, &Acceleration::default()) {
        Ok(pinned) => pinned,
        Err(error) => return Some(Err(Obstacle::NotOurs(error))),
    };
    let counts_waiting_bytes = pinned.counts_waiting_bytes();
    let adopted =
        || vec![Check { name: "what is pinned here can be taken over", outcome: Outcome::Passed }];
    let direct = pinned.no_direct().map_or_else(|| Ok(adopted()), Err);
    let sockmap = pinned.sockmap.map(|_| adopted());
    Some(Ok(Found { direct, sockmap, counts_waiting_bytes, facts: Vec::new() }))
}

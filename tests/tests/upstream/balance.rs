//! The policies that are the same on every way: what is chosen in user space, and what in the kernel.

use ambassador_tests::echo::Echo;
use ambassador_tests::way::Way;
use anyhow::{Result, ensure};

use crate::{are_direct_or_not, balanced_by, hold, tally};

#[test]
fn random_two_spreads_by_weight() -> Result<()> {
    for way in Way::proxied()? {
        let (light, heavy) = (Echo::greeting("l")?, Echo::greeting("h")?);
        let endpoints = [(light.address(), 1), (heavy.address(), 3)];
        let (ambassador, route) = balanced_by(way, "random_two", &endpoints)?;
        let held = hold(&route, 80)?;
        // They stay open, so that whichever has fewer for its weight is taken when both are drawn.
        let light = tally(&held).get("l").copied().unwrap_or(0);
        ensure!((14..=26).contains(&light), "{way}: {light} of 80 went to a weight of 1 in 4");
        are_direct_or_not(&ambassador, way)?;
    }
    Ok(())
}

#[test]
fn all_connections_of_a_pod_hash_to_one_endpoint() -> Result<()> {
    let servers = ["a", "b", "c"].map(Echo::greeting);
    let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    let endpoints: Vec<_> = servers.iter().map(|echo| (echo.address(), 1)).collect();
    let mut chosen = None;
    for way in Way::proxied()? {
        let (ambassador, route) = balanced_by(way, "source_hash", &endpoints)?;
        let held = hold(&route, 10)?;
        let tally = tally(&held);
        ensure!(tally.len() == 1, "{way}: {tally:?}");
        let one = tally.into_keys().next().map(str::to_owned);
        ensure!(chosen.is_none() || chosen == one, "{way}: {one:?} instead of {chosen:?}");
        chosen = one;
        are_direct_or_not(&ambassador, way)?;
    }
    Ok(())
}

//! The policies that are the same on every way: what is chosen in user space, and what in the kernel.

use ambassador_tests::echo::Echo;
use ambassador_tests::wait::until_true;
use ambassador_tests::way::Way;
use anyhow::{Context, Result, ensure};

use crate::ejection::until_is;
use crate::{are_direct_or_not, balanced_by, balanced_with, dead, hold, tally};

const POLICIES: [&str; 6] = [
    "failover",
    "failover_sticky",
    "round_robin",
    "least_connections",
    "random_two",
    "source_hash",
];
/// More endpoints than the kernel looks at for one connection.
const CROWD: [&str; 12] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"];

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
fn least_connections_fills_by_weight() -> Result<()> {
    for way in Way::proxied()? {
        let (light, heavy) = (Echo::greeting("l")?, Echo::greeting("h")?);
        let endpoints = [(light.address(), 1), (heavy.address(), 3)];
        let (ambassador, route) = balanced_by(way, "least_connections", &endpoints)?;
        let mut held = hold(&route, 40)?;
        ensure!(tally(&held) == [("h", 30), ("l", 10)].into(), "{way}: {:?}", tally(&held));
        are_direct_or_not(&ambassador, way)?;

        // What one has lost it is given again, whatever the turn.
        held.retain(|(name, _)| name == "h");
        held.truncate(15);
        until_true("the end of the others", || {
            Ok(ambassador.access_records("outcome", "ok")?.len() == 25)
        })?;
        let more = hold(&route, 5)?;
        ensure!(tally(&more) == [("l", 5)].into(), "{way}: {:?}", tally(&more));
        held.extend(more);
        held.extend(hold(&route, 20)?);
        ensure!(tally(&held) == [("h", 30), ("l", 10)].into(), "{way}: {:?}", tally(&held));
    }
    Ok(())
}

/// The kernel looks at eight for a connection.
#[test]
fn many_endpoints_all_get_their_share() -> Result<()> {
    let servers = CROWD.map(Echo::greeting).into_iter().collect::<Result<Vec<_>>>()?;
    let endpoints: Vec<_> = servers.iter().map(|echo| (echo.address(), 1)).collect();
    for way in Way::proxied()? {
        for (balance, most) in [("round_robin", 3), ("least_connections", 4), ("random_two", 7)] {
            let (ambassador, route) = balanced_by(way, balance, &endpoints)?;
            let held = hold(&route, 3 * CROWD.len())?;
            let reached = tally(&held);
            let fewest = if balance == "random_two" { 1 } else { 6 - most };
            let evenly = reached.values().all(|it| (fewest..=most).contains(it));
            let enough = balance == "random_two" || reached.len() == CROWD.len();
            ensure!(evenly && enough, "{way}, {balance}: {reached:?}");
            are_direct_or_not(&ambassador, way)?;
        }
    }
    Ok(())
}

#[test]
fn of_many_endpoints_the_last_is_found_while_all_others_are_down() -> Result<()> {
    let last = Echo::greeting("l")?;
    let mut addresses = (1..CROWD.len()).map(|_| dead()).collect::<Result<Vec<_>>>()?;
    addresses.push(last.address().clone());
    let endpoints: Vec<_> = addresses.iter().map(|address| (address, 1)).collect();
    let more = "eject: none
    health: { check: tcp, interval: 100ms, timeout: 1s, fall: 2, rise: 2 }";
    for way in Way::proxied()? {
        for balance in POLICIES {
            let (ambassador, route) = balanced_with(way, balance, &endpoints, more)?;
            for address in &addresses[..CROWD.len() - 1] {
                until_is(&ambassador, address, false).with_context(|| format!("{way}"))?;
            }
            let held = hold(&route, 5).with_context(|| format!("{way}, {balance}"))?;
            ensure!(tally(&held) == [("l", 5)].into(), "{way}, {balance}: {:?}", tally(&held));
            are_direct_or_not(&ambassador, way)?;
        }
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

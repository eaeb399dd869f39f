//! `max_connections` holds whichever way connections take.

use anyhow::{Result, ensure};

use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::needs;
use ambassador_tests::place::Place;
use ambassador_tests::wait::until_true;

use crate::{ROUTE, all_are_direct, connect_bound, hold, start_with};

#[test]
fn connections_of_both_ways_count_and_one_too_many_is_refused() -> Result<()> {
    needs!(Direct);
    let echo = Echo::greeting("e")?;
    let upstream = format!("endpoints: ['{}']", echo.address());
    let (ambassador, route) = start_with(&Place::here(), "max_connections: 4", &upstream)?;
    let relayed = [connect_bound(&route)?, connect_bound(&route)?];
    relayed.iter().try_for_each(|client| client.hear(1).map(drop))?;
    let direct = hold(&route, 2)?;
    all_are_direct(&ambassador, &direct)?;

    route.connect()?.hear_close()?;
    connect_bound(&route)?.hear_close()?;
    ensure!(echo.accepted() == 4, "{} of 4 connections were let through", echo.accepted());
    until_true("two refusals in the metrics", || {
        let refused = [("route", ROUTE), ("outcome", "refused")];
        Ok(ambassador.metrics()?.sum("ambassador_connections_total", &refused) == Some(2.0))
    })?;

    drop(direct);
    until_true("room for another", || Ok(greeted(&route, 1).is_ok()))?;
    Ok(())
}

#[test]
fn a_place_is_free_again_however_a_connection_ends() -> Result<()> {
    needs!(Direct);
    let echo = Echo::greeting("e")?;
    let upstream = format!("endpoints: ['{}']", echo.address());
    let (_ambassador, route) = start_with(&Place::here(), "max_connections: 1", &upstream)?;
    for round in 0..30 {
        until_true("room for another", || {
            let Ok((_, client)) = greeted(&route, 1) else { return Ok(false) };
            match round % 3 {
                0 => client.reset()?,
                1 => client.finish().and_then(|()| client.hear_end())?,
                _ => {}
            }
            Ok(true)
        })?;
    }
    Ok(())
}

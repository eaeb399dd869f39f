//! A tier that is changed, explained and drained while connections are open.

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::{self, Ambassador, Launch};
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::needs;
use ambassador_tests::place::Place;
use ambassador_tests::process::Process;
use ambassador_tests::wait::{SOON, until_true};

use crate::{ROUTE, connect_bound, is_direct, loopback, start, tier_of};

#[test]
fn a_tier_changes_for_new_connections_and_back() -> Result<()> {
    needs!(Direct);
    let Front { ambassador, route, _echo } = Front::start()?;
    let order = |tier: &str| ambassador.command(&["tier", ROUTE, tier])?.success().map(drop);
    let explained = || ambassador.command(&["explain", ROUTE])?.success();
    let in_force = |tier: &str| {
        let labels = [("route", ROUTE), ("tier", tier)];
        Ok::<_, anyhow::Error>(ambassador.metrics()?.sum("ambassador_tier_info", &labels))
    };
    let (_, before) = greeted(&route, 1)?;
    is_direct(&ambassador, &before)?;
    ensure!(explained()?.starts_with(&format!("{ROUTE}: direct; ")), "{}", explained()?);
    ensure!(in_force("direct")? == Some(1.0));

    order("splice")?;
    let (_, between) = greeted(&route, 1)?;
    ensure!(tier_of(&ambassador, &between)? == "splice");
    let text = explained()?;
    ensure!(text.starts_with(&format!("{ROUTE}: splice\n")), "{text}");
    ensure!(text.contains("direct: not used: not allowed (tier: splice)"), "{text}");
    ensure!(in_force("direct")?.is_none() && in_force("splice")? == Some(1.0));

    order("auto")?;
    let (_, after) = greeted(&route, 1)?;
    is_direct(&ambassador, &after)?;
    is_direct(&ambassador, &before)?;
    ensure!(tier_of(&ambassador, &between)? == "splice");
    [&before, &between, &after].iter().try_for_each(|it| it.ask(b"still there?", b"still there?"))
}

/// It had the same maps: what it tried must not be taken for what apps did.
#[test]
fn what_the_self_test_tried_is_not_told() -> Result<()> {
    needs!(Direct);
    let Front { ambassador, .. } = Front::start()?;
    let text = ambassador.command(&["explain", ROUTE])?.success()?;
    ensure!(text.starts_with(&format!("{ROUTE}: direct; ")), "{text}");
    ensure!(!text.contains("left to the listeners"), "{text}");
    let metrics = ambassador.metrics()?;
    let passed = metrics.sum("ambassador_selftest_result", &[("tier", "direct")]);
    // Three of them take IPv6.
    let enough = passed.is_some_and(|passed| (6.0..=9.0).contains(&passed));
    ensure!(enough, "{passed:?} checks have passed");
    let ended = metrics.sum("ambassador_connections_total", &[]);
    ensure!(ended.unwrap_or(0.0) == 0.0, "{ended:?} connections have ended");
    Ok(())
}

#[test]
fn the_kill_switch_is_for_all_routes() -> Result<()> {
    needs!(Direct);
    let Front { ambassador, route, _echo } = Front::start()?;
    ambassador.command(&["tier", "all", "splice"])?.success()?;
    let (_, client) = greeted(&route, 1)?;
    ensure!(tier_of(&ambassador, &client)? == "splice");
    Ok(())
}

#[test]
fn a_drain_ends_redirection_and_cuts_nothing() -> Result<()> {
    needs!(Direct);
    let Front { ambassador, route, _echo } = Front::start()?;
    let relayed = connect_bound(&route)?;
    relayed.hear(1)?;
    let (_, direct) = greeted(&route, 1)?;
    ambassador.process.signal(libc::SIGTERM)?;
    until_true("new connections to be refused", || Ok(route.connect().is_err()))?;
    let relayed_still = || relayed.ask(b"still carried", b"still carried");
    relayed_still().context("the relayed connection during the drain")?;
    direct.ask(b"still there?", b"still there?")?;
    // Redirected connections need nobody, and hold up no drain.
    drop(relayed);
    ambassador.ends_with(0)?;
    direct.ask(b"even now?", b"even now?")
}

#[test]
fn a_drain_redirects_during_its_grace() -> Result<()> {
    needs!(Direct);
    let here = Place::here();
    let (echo, route) = (Echo::greeting("e")?, loopback(&here)?);
    let ambassador = Launch::new(&here.with_bpffs()?)?
        .in_kernel("direct")?
        .flag("--drain-grace", "2s")
        .route(format!("{ROUTE}:{route}={}", echo.address()))
        .start()?;
    ambassador.process.signal(libc::SIGTERM)?;
    ambassador.until_answers("/readyz", 503)?;
    let (_, client) = greeted(&route, 1).context("connect during the grace")?;
    is_direct(&ambassador, &client)?;
    until_true("the end of the grace", || Ok(route.connect().is_err()))?;
    client.ask(b"still there?", b"still there?")?;
    ambassador.ends_with(0)
}

#[test]
fn a_probe_takes_the_way_of_an_app() -> Result<()> {
    needs!(Direct);
    let Front { ambassador, route, _echo: echo } = Front::start()?;
    let probe = || {
        let mut probe = ambassador::command(&Place::here())?;
        Process::start(probe.args(["probe", "tcp", &route.to_string()]))?.finish(SOON)
    };
    probe()?.success()?;
    until_true("the record of the probe", || {
        Ok(ambassador.access_records("tier", "direct")?.len() == 1)
    })?;
    drop(echo);
    ensure!(probe()?.code() == Some(1), "a service that does not listen was found to answer");
    Ok(())
}

/// An ambassador whose route leads to a greeting echo.
struct Front {
    ambassador: Ambassador,
    route: Address,
    _echo: Echo,
}

impl Front {
    fn start() -> Result<Self> {
        let (echo, route) = (Echo::greeting("e")?, loopback(&Place::here())?);
        Ok(Self { ambassador: start(&Place::here(), &route, echo.address())?, route, _echo: echo })
    }
}

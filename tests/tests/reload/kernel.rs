//! Reloads of routes that the kernel carries: its tables are true when the reload returns, and do not fill up.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::{self, Ambassador, Launch};
use ambassador_tests::cgroup;
use ambassador_tests::echo::Echo;
use ambassador_tests::peer::Peer;
use ambassador_tests::place::{BPFFS, Place};
use ambassador_tests::process::{Process, run};
use ambassador_tests::wait::{SOON, until_true};
use ambassador_tests::way::Way;
use ambassador_tests::{installed, needs};

use crate::{Route, config, loopback, names, reaches, refuses, route, succeeds};

/// What `load` has room for beside the routes that it was told of.
const SPARE: usize = 64;

#[test]
fn the_kernel_s_tables_are_true_when_a_reload_returns() -> Result<()> {
    needs!(Direct);
    let here = Place::here();
    let [a, b] = [Echo::greeting("a")?, Echo::greeting("b")?];
    let [one, two] = [loopback(&here)?, loopback(&here)?];
    let first = config(&[route("one", &one, a.address())]);
    let ambassador = Way::Direct.launch(&here)?.config(&first)?.start()?;
    let led = |listen: &Address, greeting: &str| {
        let client = reaches(listen, greeting)?;
        let tier = tier_of(&ambassador, &client)?;
        ensure!(tier == "direct", "{listen} is carried by {tier}");
        Ok(client)
    };
    let held = led(&one, "a")?;
    for (name, one_to, two_to) in [("two", &b, &a), ("two", &a, &b), ("renamed", &a, &a)] {
        succeeds(
            &ambassador,
            &[route("one", &one, one_to.address()), route(name, &two, two_to.address())],
        )?;
        let greeting = |echo: &Echo| if echo.address() == a.address() { "a" } else { "b" };
        led(&one, greeting(one_to))?;
        led(&two, greeting(two_to))?;
    }
    succeeds(&ambassador, &[route("one", &two, b.address())])?;
    refuses(&one).context("the kernel still leads there")?;
    led(&two, "b")?;
    held.ask(b"still here", b"still here")?;
    ensure!(ambassador.status()?["routes"][0]["connections"] == 1, "{}", ambassador.status()?);
    Ok(())
}

#[test]
fn tiers_follow_up_and_down() -> Result<()> {
    needs!(Direct);
    needs!(Sockmap);
    let here = Place::here();
    let echo = Echo::greeting("e")?;
    let listen = loopback(&here)?;
    let by = |tier: &str| {
        let more = format!("tier: {tier}");
        config(&[Route { more: &more, ..route("one", &listen, echo.address()) }])
    };
    let launch = Launch::new(&here.with_bpffs()?)?.cgroup(cgroup::of_this_process()?);
    let ambassador = launch.config(&by("direct"))?.start()?;
    let mut held = Vec::new();
    for tier in ["direct", "sockmap", "splice", "sockmap", "direct", "copy"] {
        ambassador.reconfigure(&by(tier))?.success()?;
        let client = reaches(&listen, "e")?;
        client.ask(b"first", b"first")?;
        client.ask(b"second", b"second")?;
        client.ask(b"third", b"third")?;
        let carried = tier_of(&ambassador, &client)?;
        ensure!(carried == tier, "by {carried} and not by {tier}");
        held.push((tier, client));
    }
    for (tier, client) in &held {
        client.ask(&[b'x'; 50_000], &[b'x'; 50_000])?;
        let carried = tier_of(&ambassador, client)?;
        ensure!(carried == *tier, "what was carried by {tier} is now by {carried}");
    }
    Ok(())
}

#[test]
fn what_was_loaded_without_privileges_follows_and_says_when_it_is_full() -> Result<()> {
    needs!(Direct);
    let place = Place::here().with_bpffs()?;
    let echo = Echo::greeting("e")?;
    let mut load = ambassador::command(&place)?;
    load.args(["load", "--for", "65532:65532", "--instance", "reload", "--route", "1=127.0.0.1:2"]);
    load.arg("--cgroup").arg(cgroup::of_this_process()?);
    Process::start(&mut load)?.finish(SOON)?.success()?;

    let first = loopback(&place)?;
    let launch = Launch::new(&place)?.flag("--instance", "reload").by_user(65_532)?;
    let ambassador = launch.config(&config(&[route("r0", &first, echo.address())]))?.start()?;
    let held = reaches(&first, "e")?;
    ensure!(tier_of(&ambassador, &held)? == "direct");

    let mut listens = vec![first.clone()];
    for _ in 0..SPARE + 1 {
        listens.push(loopback(&place)?);
    }
    let names: Vec<_> = (0..listens.len()).map(|at| format!("r{at}")).collect();
    let mut all: Vec<_> = names
        .iter()
        .zip(&listens)
        .map(|(name, listen)| route(name, listen, echo.address()))
        .collect();
    succeeds(&ambassador, &all)?;
    let last = listens.last().context("find the last")?;
    for (listen, tier) in [(&listens[SPARE], "direct"), (last, "splice")] {
        let carried = tier_of(&ambassador, &reaches(listen, "e")?)?;
        ensure!(carried == tier, "{listen} is carried by {carried} and not by {tier}");
    }
    let explained = ambassador.command(&["explain", &names[SPARE + 1]])?.success()?;
    ensure!(explained.contains("was loaded for 65 routes"), "{explained}");

    // There is room again when another one goes.
    all.remove(1);
    succeeds(&ambassador, &all)?;
    let carried = tier_of(&ambassador, &reaches(last, "e")?)?;
    ensure!(carried == "direct", "carried by {carried} though there is room");
    held.ask(b"still here", b"still here")
}

#[test]
fn the_kernel_s_maps_do_not_fill_up() -> Result<()> {
    needs!(Direct);
    installed!("bpftool");
    let place = Place::here().with_bpffs()?;
    let echo = Echo::greeting("e")?;
    let listens = [loopback(&place)?, loopback(&place)?];
    let text =
        |round: usize| config(&[route(&format!("r{round}"), &listens[round % 2], echo.address())]);
    let launch = Launch::new(&place)?.in_kernel("direct")?.flag("--instance", "reload");
    let ambassador = launch.config(&text(0))?.start()?;
    let entries = |map: &str| -> Result<usize> {
        let path = format!("{BPFFS}/ambassador/reload/maps/{map}");
        let dumped =
            run(place.command("bpftool").args(["-j", "map", "dump", "pinned", &path]), SOON)?;
        let dumped: Value = serde_json::from_str(&dumped)?;
        Ok(dumped.as_array().context("find the entries")?.len())
    };
    for round in 0..3 * SPARE {
        ambassador.reconfigure(&text(round))?.success()?;
        if round % 16 == 0 {
            let client = reaches(&listens[round % 2], "e")?;
            ensure!(tier_of(&ambassador, &client)? == "direct", "after {round} reloads");
        }
    }
    ensure!(entries("LISTENERS")? == 1, "{} listeners", entries("LISTENERS")?);
    until_true("targets of routes that are gone to go", || {
        ambassador.get("/metrics")?;
        Ok(entries("TARGETS")? <= 2)
    })?;
    ensure!(names(&ambassador)?.len() == 1);
    ambassador.end()
}

/// What carries this client's connection.
fn tier_of(ambassador: &Ambassador, client: &Peer) -> Result<String> {
    let local = client.socket().local_addr()?.as_socket().context("find the client's address")?;
    let local = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), local.port());
    let told = ambassador.connections()?;
    let ours = told.iter().find(|it| it["peer"] == local.to_string());
    let ours = ours.with_context(|| format!("find {local} in {told:?}"))?;
    Ok(ours["tier"].as_str().unwrap_or_default().to_owned())
}

//! What the kernel half does without, before and after the process that it serves: pins, takeover, load and
//! unload. Each test has a bpffs of its own, which goes with it.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::{self, Ambassador, Launch};
use ambassador_tests::cgroup;
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::needs;
use ambassador_tests::peer::Peer;
use ambassador_tests::place::{BPFFS, Place};
use ambassador_tests::process::{Finished, Process, run};
use ambassador_tests::wait::{SOON, until, until_true};

mod doctor;
mod loaded;
mod replaced;

const INSTANCE: &str = "lifecycle";
const USER: u32 = 65_532;
const TIER_MISSING: i32 = 77;

#[test]
fn pins_go_with_a_clean_end() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let ambassador = scene.launch()?.start()?;
    ensure!(scene.pinned()?.iter().any(|pin| pin == &format!("{INSTANCE}/links/connect4")));
    ambassador.end()?;
    ensure!(scene.pinned()?.is_empty(), "left behind: {:?}", scene.pinned()?);
    ensure!(scene.route.connect().is_err(), "redirected after the end");
    Ok(())
}

#[test]
fn a_start_that_fails_leaves_nothing_pinned() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let taken = scene.route.listen()?;
    scene.launch()?.spawn()?.ends_with(1)?;
    ensure!(scene.pinned()?.is_empty(), "left behind: {:?}", scene.pinned()?);
    drop(taken);

    let unfit = Path::new("/nowhere/socket");
    let unfit = format!(
        "{}={}",
        Address::from(std::net::SocketAddr::from(([127, 0, 0, 1], scene.place.port()?))),
        Address::Unix(unfit.into())
    );
    scene.launch()?.route(unfit).spawn()?.ends_with(TIER_MISSING)?;
    ensure!(scene.pinned()?.is_empty(), "left behind: {:?}", scene.pinned()?);
    Ok(())
}

#[test]
fn connections_survive_a_kill_and_the_next_ambassador_tells_of_them() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let before = scene.launch()?.start()?;
    let [held, over] = [scene.connect()?, scene.connect()?];
    drop(before);
    drop(scene.route.listen().context("the port of an ambassador that was killed is free")?);
    held.ask(b"still there?", b"still there?")?;
    let orphan = scene.connect().context("connect by the last good table")?;
    let peer = over.socket().local_addr()?.as_socket().context("find an address")?.to_string();
    over.finish()?;
    over.hear_end()?;

    let after = scene.launch()?.start()?;
    until_true("word of the takeover", || {
        Ok(after.log()?.iter().any(|line| line.to_string().contains("taking over")))
    })?;
    let record = until("the record of what ended meanwhile", SOON, || {
        Ok(after.access_records("peer", &peer)?.pop())
    })?;
    ensure!(record["outcome"] == "ok" && record["bytes_down"] == 1, "{record}");
    ensure!(status(&after)?["connections"] == 2, "{}", status(&after)?);
    let new = scene.connect()?;
    ensure!(after.connections()?.len() == 3);
    held.ask(b"and now?", b"and now?")?;
    drop((held, orphan, new));
    until_true("three more records", || Ok(after.access_records("tier", "direct")?.len() == 4))?;
    let sum = after.metrics()?.sum("ambassador_bytes_total", &[("tier", "direct")]);
    // Two greetings, of those that were not open at the start, and eight bytes there and back: what the
    // others moved before has been counted.
    ensure!(sum == Some(2.0 + 16.0), "{sum:?} bytes");
    ensure!(status(&after)?["connections"] == 0);
    after.end()?;
    ensure!(scene.pinned()?.is_empty(), "left behind: {:?}", scene.pinned()?);
    Ok(())
}

#[test]
fn the_next_ambassador_s_routes_replace_those_of_one_that_was_killed() -> Result<()> {
    needs!(Direct);
    let mut scene = Scene::new()?;
    drop(scene.launch()?.start()?);
    let old = scene.route.clone();
    greeted(&old, 1).context("connect by the last good table")?;
    scene.route = std::net::SocketAddr::from(([127, 0, 0, 1], scene.place.port()?)).into();
    let _after = scene.launch()?.start()?;
    ensure!(old.connect().is_err(), "an address that is routed no more is redirected");
    let _client = scene.connect()?;
    Ok(())
}

#[test]
fn the_next_ambassador_s_lower_tier_is_obeyed() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    drop(scene.launch()?.start()?);
    let next = Launch::new(&scene.place)?.flag("--instance", INSTANCE).flag("--tier", "splice");
    let next = next.route(format!("routed:{}={}", scene.route, scene.echo.address())).start()?;
    let client = scene.connect()?;
    ensure!(next.tiers()? == ["splice"], "{:?}", next.tiers()?);
    drop(client);
    next.end()?;
    ensure!(scene.pinned()?.is_empty(), "left behind: {:?}", scene.pinned()?);
    Ok(())
}

#[test]
fn a_dead_ambassador_s_table_closes_when_it_is_stale() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    drop(scene.launch()?.flag("--stale-after", "10s").start()?);
    let killed = Instant::now();
    let held = scene.connect()?;
    until_true("the table to close", || Ok(scene.route.connect().is_err()))?;
    let closed = killed.elapsed();
    ensure!((5..=11).contains(&closed.as_secs()), "after {closed:?}");
    held.ask(b"still there?", b"still there?")
}

#[test]
fn what_is_in_use_is_left_to_its_user() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let ambassador = scene.launch()?.start()?;
    let second = Launch::new(&scene.place)?.in_kernel("direct")?.flag("--instance", INSTANCE);
    let elsewhere = std::net::SocketAddr::from(([127, 0, 0, 1], scene.place.port()?));
    let second = second.route(format!("{elsewhere}={}", scene.echo.address()));
    is_refused(second, "is in use by another ambassador")?;
    for words in [&["unload", "--instance", INSTANCE][..], &["unload", "--stale"]] {
        let unloaded = scene.command(words)?;
        let lines = unloaded.stderr.lines().count();
        ensure!(lines == usize::from(unloaded.code() != Some(0)), "{unloaded:?}");
    }
    let loaded = scene.load(INSTANCE, cgroup::of_this_process()?)?;
    ensure!(loaded.stderr.contains("is in use by another ambassador"), "{loaded:?}");
    let _client = scene.connect()?;
    ensure!(ambassador.tiers()? == ["direct"]);
    Ok(())
}

#[test]
fn a_half_made_instance_is_made_anew_or_removed() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    // What was in place is of an earlier version, and what is beside it has never been in place.
    for half in [format!("{INSTANCE}/maps"), format!("{INSTANCE}~/maps")] {
        let half = format!("{BPFFS}/ambassador/{half}");
        let make = || run(scene.place.command("mkdir").args(["-p", &half]), SOON);
        make()?;
        let ambassador = scene.launch()?.start()?;
        let _client = scene.connect()?;
        ensure!(ambassador.tiers()? == ["direct"]);
        ambassador.end()?;
        ensure!(scene.pinned()?.is_empty(), "left behind: {:?}", scene.pinned()?);

        make()?;
        scene.command(&["unload", "--instance", INSTANCE])?.success()?;
        ensure!(scene.pinned()?.is_empty(), "not removed: {:?}", scene.pinned()?);
    }
    let outside = scene.command(&["unload", "--instance", "../ambassador"])?;
    ensure!(outside.stderr.contains("does not name an instance"), "{outside:?}");
    Ok(())
}

/// A place with a bpffs of its own, and a route from there to an echo that greets with one byte.
struct Scene {
    place: Place,
    route: Address,
    echo: Echo,
}

impl Scene {
    fn new() -> Result<Self> {
        let place = Place::here().with_bpffs()?;
        let route = std::net::SocketAddr::from(([127, 0, 0, 1], place.port()?)).into();
        Ok(Self { place, route, echo: Echo::greeting("e")? })
    }

    fn launch(&self) -> Result<Launch> {
        let launch = Launch::new(&self.place)?.in_kernel("direct")?.flag("--instance", INSTANCE);
        Ok(launch.route(format!("routed:{}={}", self.route, self.echo.address())))
    }

    fn load(&self, instance: &str, cgroup: &Path) -> Result<Finished> {
        self.load_under(&[], instance, cgroup)
    }

    /// The same by another program, such as `prlimit`, that replaces itself by what follows it.
    fn load_under(&self, wrapper: &[&str], instance: &str, cgroup: &Path) -> Result<Finished> {
        self.load_as(wrapper, &[], instance, cgroup)
    }

    fn load_with(&self, flags: &[&str], instance: &str, cgroup: &Path) -> Result<Finished> {
        self.load_as(&[], flags, instance, cgroup)
    }

    fn load_as(
        &self,
        wrapper: &[&str],
        flags: &[&str],
        instance: &str,
        cgroup: &Path,
    ) -> Result<Finished> {
        let binary = ambassador::binary()?.to_string_lossy();
        let (user, cgroup) = (format!("{USER}:{USER}"), cgroup.to_string_lossy());
        let route = format!("{}={}", self.route, self.echo.address());
        let load = [&binary, "load", "--for", &user, "--instance", instance];
        let words = [wrapper, &load, flags, &["--cgroup", &cgroup, "--route", &route]].concat();
        Process::start(self.place.command(words[0]).args(&words[1..]))?.finish(SOON)
    }

    fn command(&self, words: &[&str]) -> Result<Finished> {
        Process::start(ambassador::command(&self.place)?.args(words))?.finish(SOON)
    }

    fn connect(&self) -> Result<Peer> {
        Ok(greeted(&self.route, 1)?.1)
    }

    /// All that is pinned, by its path below the directory of all instances.
    fn pinned(&self) -> Result<Vec<String>> {
        let directory = format!("{BPFFS}/ambassador");
        let all = run(self.place.command("find").arg(BPFFS), SOON)?;
        let mut pins: Vec<_> = all
            .lines()
            .filter_map(|path| path.strip_prefix(&directory)?.strip_prefix('/'))
            .map(str::to_owned)
            .collect();
        pins.sort_unstable();
        Ok(pins)
    }
}

/// Expects one line that says so, and no start below the required tier.
fn is_refused(launch: Launch, why: &str) -> Result<()> {
    let finished = launch.spawn()?.process.finish(SOON)?;
    let errors: Vec<_> =
        finished.stderr.lines().filter(|line| line.contains("\"ERROR\"")).collect();
    ensure!(finished.code() == Some(TIER_MISSING), "{finished:?}");
    ensure!(errors.len() == 1 && errors[0].contains(why), "{finished:?}");
    Ok(())
}

/// The only route, as `status` tells it.
fn status(ambassador: &Ambassador) -> Result<Value> {
    Ok(ambassador.status()?["routes"][0].clone())
}

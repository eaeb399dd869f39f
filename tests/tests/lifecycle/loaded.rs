//! What is loaded by one process for another: who may take it over, replace it and remove it.

use std::path::Path;

use ::ambassador::datapath::kernel::default_instance;
use ambassador_tests::ambassador::{self, Launch};
use ambassador_tests::cgroup::{self, Cgroup};
use ambassador_tests::needs;
use ambassador_tests::place::BPFFS;
use ambassador_tests::process::{Process, run};
use ambassador_tests::wait::{SOON, until_true};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{INSTANCE, Scene, USER, is_refused, status};

const STRANGER: u32 = 65_533;

#[test]
fn what_was_loaded_is_taken_over_without_privileges() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    scene.load(INSTANCE, cgroup::of_this_process()?)?.success()?;
    scene.load("other", cgroup::of_this_process()?)?.success()?;
    ensure!(scene.route.connect().is_err(), "redirected before anybody said where to");
    let run = || scene.launch()?.by_user(USER)?.start();
    let ambassador = run()?;
    let told = ambassador.command(&["status", "--json"])?.success()?;
    let told: Value = serde_json::from_str(&told).context("parse the status")?;
    ensure!(told["user"] == USER && told["capabilities"] == "none", "{told}");
    let held = scene.connect()?;
    ensure!(ambassador.tiers()? == ["direct"]);
    ambassador.command(&["tier", "all", "splice"])?.success()?;
    let relayed = scene.connect()?;
    ensure!(ambassador.tiers()? == ["splice", "direct"], "{:?}", ambassador.tiers()?);
    drop(relayed);
    ambassador.command(&["tier", "all", "auto"])?.success()?;

    drop(ambassador);
    scene.connect().context("connect by the last good table")?;
    let ambassador = run().context("after a kill")?;
    held.ask(b"still there?", b"still there?")?;
    ambassador.end()?;
    let ambassador = run().context("after a clean end")?;
    let _client = scene.connect()?;
    ambassador.end()?;

    scene.command(&["unload", "--instance", INSTANCE])?.success()?;
    let left = scene.pinned()?;
    ensure!(left.iter().all(|pin| pin.starts_with("other")), "left behind: {left:?}");
    ensure!(left.iter().any(|pin| pin == "other/links/connect4"), "gone too: {left:?}");
    ensure!(scene.route.connect().is_err(), "redirected after all was unloaded");
    held.ask(b"even now?", b"even now?")
}

#[test]
fn what_was_loaded_once_goes_with_the_clean_end_of_its_user() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let load = || scene.load_with(&["--once"], INSTANCE, cgroup::of_this_process()?)?.success();
    load()?;
    let run = || scene.launch()?.by_user(USER)?.start();
    drop(run()?);
    scene.connect().context("connect by the last good table")?;
    let ambassador = run().context("after a kill")?;
    let held = scene.connect()?;
    ensure!(ambassador.tiers()? == ["direct"]);
    drop(held);
    ambassador.end()?;
    ensure!(scene.pinned()?.is_empty(), "left behind: {:?}", scene.pinned()?);
    ensure!(scene.route.connect().is_err(), "redirected after the end");
    load().context("load after a clean end")?;
    load().context("replace what was given away").map(drop)
}

#[test]
fn the_doctor_without_privileges_tells_of_what_is_pinned() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let instance = default_instance()?;
    let doctor = || {
        let id = USER.to_string();
        let mut doctor = scene.place.command("setpriv");
        doctor.args(["--reuid", &id, "--regid", &id, "--clear-groups"]);
        run(doctor.arg(ambassador::binary()?).arg("doctor"), SOON)
    };
    let told = doctor()?;
    for (tier, missing) in [
        ("direct  ", "CAP_BPF and CAP_NET_ADMIN (in a Pod:"),
        ("sockmap ", "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (in a Pod:"),
    ] {
        let line = format!("{tier} no: not permitted to load programs; grant {missing}");
        ensure!(told.contains(&line), "{told}");
    }
    scene.load(&instance, cgroup::of_this_process()?)?.success()?;
    let told = doctor()?;
    ensure!(told.contains("direct   works"), "{told}");
    let launch = Launch::new(&scene.place)?.by_user(USER)?;
    let route = format!("routed:{}={}", scene.route, scene.echo.address());
    let _ambassador = launch.route(route).start()?;
    let told = doctor()?;
    ensure!(told.contains("direct   no: `ambassador explain` asks the one that runs"), "{told}");
    Ok(())
}

#[test]
fn a_pod_s_part_of_the_bpffs_is_enough() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let elsewhere = tempfile::tempdir()?;
    // As the kubelet makes and mounts it, and as systemd closes the rest to others than root.
    let part = "mkdir -m 755 $0/ambassador && mount --bind $0/ambassador $1 && mount -t tmpfs -o mode=700 none $0";
    let part = [part, BPFFS, &elsewhere.path().to_string_lossy()].map(str::to_owned);
    run(scene.place.command("sh").arg("-c").args(part), SOON)?;
    let pinned = || {
        let found = run(scene.place.command("find").arg(elsewhere.path()), SOON)?;
        Ok::<_, anyhow::Error>(found.lines().skip(1).map(str::to_owned).collect::<Vec<_>>())
    };
    scene.load_with(&["--once"], INSTANCE, cgroup::of_this_process()?)?.success()?;
    ensure!(
        pinned()?.iter().any(|pin| pin.ends_with("lifecycle/links/connect4")),
        "{:?}",
        pinned()?
    );
    let ambassador = scene.launch()?.by_user(USER)?.start()?;
    let client = scene.connect()?;
    ensure!(ambassador.tiers()? == ["direct"]);
    drop(client);
    ambassador.end()?;
    ensure!(pinned()?.is_empty(), "left behind: {:?}", pinned()?);
    Ok(())
}

#[test]
fn a_link_in_the_place_of_pins_is_not_followed() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    scene.load("victim", cgroup::of_this_process()?)?.success()?;
    let all = scene.pinned()?;
    let root = format!("{BPFFS}/ambassador");
    let plant = format!("mkdir {root}/evil && ln -s {root}/victim/maps {root}/evil/maps");
    let plant = format!("{plant} && ln -s {root}/victim {root}/worse");
    let id = USER.to_string();
    let mut planting = scene.place.command("setpriv");
    planting.args(["--reuid", &id, "--regid", &id, "--clear-groups", "sh", "-c", &plant]);
    run(&mut planting, SOON)?;
    for evil in ["evil", "worse"] {
        let unloaded = scene.command(&["unload", "--instance", evil])?;
        ensure!(unloaded.code() == Some(1) && unloaded.stderr.contains("open "), "{unloaded:?}");
    }
    scene.command(&["unload", "--stale"])?;
    let mut left = scene.pinned()?;
    left.retain(|pin| pin.starts_with("victim"));
    ensure!(left.iter().all(|pin| all.contains(pin)) && left.len() == all.len(), "{left:?}");
    Ok(())
}

#[test]
fn what_was_loaded_stays_in_force_when_it_cannot_be_replaced() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let cgroup = cgroup::of_this_process()?;
    scene.load(INSTANCE, cgroup)?.success()?;
    drop(scene.launch()?.by_user(USER)?.start()?);
    let pinned = scene.pinned()?;
    let fails = |wrapper: &[&str], cgroup: &Path, why: &str| {
        let told = scene.load_under(wrapper, INSTANCE, cgroup)?;
        ensure!(told.stderr.contains(why), "{told:?}");
        ensure!(scene.pinned()? == pinned, "{:?} is not {pinned:?}", scene.pinned()?);
        scene.connect().context("connect by the last good table").map(drop)
    };
    fails(&[], Path::new("/nowhere"), "is not a cgroup v2 directory")?;
    fails(&["prlimit", "--nofile=32:32", "--"], cgroup, "Too many open files")?;
    let remount = |how: &str| run(scene.place.command("mount").args(["-o", how, BPFFS]), SOON);
    remount("remount,ro,bind")?;
    fails(&[], cgroup, "is mounted read-only")?;
    remount("remount,rw,bind")?;

    scene.load(INSTANCE, cgroup)?.success()?;
    ensure!(scene.pinned()? == pinned, "{:?} is not {pinned:?}", scene.pinned()?);
    ensure!(scene.route.connect().is_err(), "redirected by what was replaced");
    let _again = scene.launch()?.by_user(USER)?.start()?;
    scene.connect().map(drop)
}

#[test]
fn loading_for_another_user_takes_few_capabilities() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let load = |capabilities: &str| {
        let bounds = format!("--bounding-set=-all,+bpf,+net_admin{capabilities}");
        let wrapper = ["setpriv", "--inh-caps=-all", &bounds, "--"];
        Ok::<_, anyhow::Error>(
            scene.load_under(&wrapper, INSTANCE, cgroup::of_this_process()?)?.stderr,
        )
    };
    let told = load("")?;
    ensure!(told.contains("CAP_CHOWN") && scene.pinned()?.is_empty(), "{told}");
    let told = load(",+chown")?;
    ensure!(told.contains("pinned at"), "{told}");
    let told = load(",+chown")?;
    ensure!(told.contains("CAP_DAC_READ_SEARCH"), "{told}");
    let told = load(",+chown,+dac_read_search")?;
    ensure!(told.contains("pinned at"), "{told}");
    let _ambassador = scene.launch()?.by_user(USER)?.start()?;
    scene.connect().map(drop)
}

#[test]
fn what_was_loaded_for_one_user_is_closed_to_another() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    scene.load(INSTANCE, cgroup::of_this_process()?)?.success()?;
    is_refused(scene.launch()?.by_user(STRANGER)?, "belongs to the user that")?;

    let here = Launch::new(&scene.place)?.flag("--instance", INSTANCE).by_user(STRANGER)?;
    let lower = here.route(format!("routed:{}={}", scene.route, scene.echo.address())).start()?;
    let _client = scene.connect()?;
    ensure!(status(&lower)?["tier"] == "splice");
    let explained = lower.command(&["explain"])?.success()?;
    ensure!(explained.contains("direct: not used: open "), "{explained}");
    Ok(())
}

#[test]
fn a_stranger_cannot_keep_an_instance_from_its_user() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    scene.load(INSTANCE, cgroup::of_this_process()?)?.success()?;
    let id = STRANGER.to_string();
    let mut held = Vec::new();
    for pin in scene.pinned()? {
        let mut locking = scene.place.command("setpriv");
        locking.args(["--reuid", &id, "--regid", &id, "--clear-groups", "flock", "--no-fork"]);
        locking.arg("--nonblock").arg(format!("{BPFFS}/ambassador/{pin}")).args([
            "sh",
            "-c",
            "echo; exec sleep 60",
        ]);
        let mut process = Process::start(&mut locking)?;
        until_true("a lock, or a refusal", || {
            Ok(!process.stdout().is_empty() || process.ended()?.is_some())
        })?;
        if process.ended()?.is_none() {
            held.push((pin, process));
        }
    }
    let names: Vec<_> = held.iter().map(|(pin, _)| &pin[..]).collect();
    ensure!(names == [INSTANCE, &format!("{INSTANCE}/maps")], "{names:?}");
    let _ambassador = scene.launch()?.by_user(USER)?.start()?;
    scene.connect().map(drop)
}

#[test]
fn what_belongs_to_a_pod_that_is_gone_can_be_removed() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let [gone, run] = [Cgroup::new()?, Cgroup::new()?];
    scene.load("gone", gone.path())?.success()?;
    scene.load("alive", cgroup::of_this_process()?)?.success()?;
    let ambassador = Launch::new(&scene.place)?
        .flag("--instance", "run")
        .cgroup(run.path())
        .route(format!("routed:{}={}", scene.route, scene.echo.address()))
        .start()?;
    drop((gone, run));
    // The kernel takes the programs off a group that is gone in its own time.
    until_true("what is stale to be removed", || {
        let told = scene.command(&["unload", "--stale"])?.success()?;
        ensure!(!told.contains("alive") && !told.contains("run"), "{told}");
        Ok(told.contains("gone"))
    })?;
    let mut left: Vec<_> = scene.pinned()?;
    left.retain(|pin| pin.ends_with("/links"));
    ensure!(left == ["alive/links", "run/links"], "{left:?}");
    scene.connect().context("traffic goes on by the listener")?;
    ambassador.end()
}

#[test]
fn loading_removes_what_pods_that_are_gone_left() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let gone = Cgroup::new()?;
    scene.load_with(&["--once"], "gone", gone.path())?.success()?;
    drop(gone);
    until_true("what is stale to be removed", || {
        scene.load("alive", cgroup::of_this_process()?)?.success()?;
        Ok(!scene.pinned()?.iter().any(|pin| pin.starts_with("gone")))
    })?;
    scene.launch()?.start()?.end()?;
    ensure!(
        scene.pinned()?.iter().any(|pin| pin == "alive/links/connect4"),
        "{:?}",
        scene.pinned()?
    );
    Ok(())
}

#[test]
fn what_others_put_beside_the_pins_is_left_alone_and_named() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    scene.load(INSTANCE, cgroup::of_this_process()?)?.success()?;
    let foreign = format!("{BPFFS}/ambassador/{INSTANCE}/foreign");
    run(scene.place.command("mkdir").arg(&foreign), SOON)?;
    let unloaded = scene.command(&["unload", "--instance", INSTANCE])?;
    ensure!(unloaded.code() == Some(1) && unloaded.stderr.lines().count() == 1, "{unloaded:?}");
    let left = scene.pinned()?;
    ensure!(left == [INSTANCE.to_owned(), format!("{INSTANCE}/foreign")], "{left:?}");
    Ok(())
}

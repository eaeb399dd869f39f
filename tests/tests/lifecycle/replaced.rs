//! What another version or build has pinned: who replaces it, and what is in force meanwhile.

use std::mem::offset_of;

use ::ambassador::datapath::tables::Settings;
use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::cgroup;
use ambassador_tests::place::BPFFS;
use ambassador_tests::process::run;
use ambassador_tests::wait::{SOON, until_true};
use ambassador_tests::{installed, needs};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{INSTANCE, Scene, USER, is_refused};

#[test]
fn what_another_version_left_is_replaced_by_who_may_and_refused_by_others() -> Result<()> {
    needs!(Direct);
    installed!("bpftool");
    let scene = Scene::new()?;
    scene.load(INSTANCE, cgroup::of_this_process()?)?.success()?;
    set(&scene, offset_of!(Settings, version))?;

    is_refused(scene.launch()?.by_user(USER)?, "was pinned by another version")?;
    let ambassador = scene.launch()?.start()?;
    serves_and_leaves_nothing(&scene, ambassador)
}

#[test]
fn what_another_version_left_stays_in_force_until_it_is_replaced() -> Result<()> {
    needs!(Direct);
    installed!("bpftool");
    let scene = Scene::new()?;
    drop(scene.launch()?.start()?);
    set(&scene, offset_of!(Settings, version))?;
    let pinned = scene.pinned()?;
    let fails = scene.launch()?.under(&["prlimit", "--nofile=32:32", "--"]);
    is_refused(fails, "Too many open files")?;
    ensure!(scene.pinned()? == pinned, "{:?} is not {pinned:?}", scene.pinned()?);
    scene.connect().context("connect by the last good table")?;

    let taken = scene.route.listen()?;
    scene.launch()?.spawn()?.ends_with(1)?;
    ensure!(scene.pinned()? == pinned, "{:?} is not {pinned:?}", scene.pinned()?);
    scene.connect().context("connect after a start that failed")?;
    drop(taken);

    let ambassador = scene.launch()?.start()?;
    ensure!(scene.pinned()? == pinned, "{:?} is not {pinned:?}", scene.pinned()?);
    serves_and_leaves_nothing(&scene, ambassador)
}

#[test]
fn what_another_build_left_is_replaced_by_who_may_and_told_of_by_others() -> Result<()> {
    needs!(Direct);
    installed!("bpftool");
    let scene = Scene::new()?;
    scene.load(INSTANCE, cgroup::of_this_process()?)?.success()?;
    set(&scene, offset_of!(Settings, object))?;
    let told = |ambassador: &Ambassador, words: &str| {
        Ok::<_, anyhow::Error>(ambassador.log()?.iter().any(|it| it.to_string().contains(words)))
    };
    let ambassador = scene.launch()?.by_user(USER)?.start()?;
    until_true("a warning", || told(&ambassador, "which is of another build; `ambassador load`"))?;
    let client = scene.connect()?;
    ensure!(ambassador.tiers()? == ["direct"]);
    drop(client);
    ambassador.end()?;

    let ambassador = scene.launch()?.start()?;
    ensure!(!told(&ambassador, "taking over")?, "{:?}", ambassador.log()?);
    serves_and_leaves_nothing(&scene, ambassador)
}

fn serves_and_leaves_nothing(scene: &Scene, ambassador: Ambassador) -> Result<()> {
    let _client = scene.connect()?;
    ensure!(ambassador.tiers()? == ["direct"]);
    ambassador.end()?;
    ensure!(scene.pinned()?.is_empty(), "left behind: {:?}", scene.pinned()?);
    Ok(())
}

/// Has the settings that are pinned say something else at this byte.
fn set(scene: &Scene, at: usize) -> Result<()> {
    let settings = format!("{BPFFS}/ambassador/{INSTANCE}/maps/SETTINGS");
    let bpftool = |words: &[&str]| run(scene.place.command("bpftool").args(words), SOON);
    let dumped = bpftool(&["-j", "map", "lookup", "pinned", &settings, "key", "0", "0", "0", "0"])?;
    let dumped: Value = serde_json::from_str(&dumped).context("parse the settings")?;
    let dumped = dumped["value"].as_array().context("find the settings")?;
    let mut value: Vec<_> = dumped.iter().filter_map(Value::as_str).collect();
    value[at] = if value[at] == "0xfe" { "0xfd" } else { "0xfe" };
    let mut words = vec!["map", "update", "pinned", &settings, "key", "0", "0", "0", "0", "value"];
    words.extend(value);
    bpftool(&words).map(drop)
}

//! How a Pod ends, and what an app notices when only its ambassador does.

use ambassador_tests::wait::{SOON, until_true};
use anyhow::{Context, Result, ensure};

use crate::{AMBASSADOR, APP, PORT, Scene, is_ready, overlay, podman_and_kubectl};

/// A conversation of the app that takes some time: it says the first half, and the other once it is told to.
const HALVES: &str = "(printf first; while ! test -e /dev/shm/go; do sleep 0.1; done; printf second) | nc 127.0.0.1 ";

#[test]
fn a_killed_sidecar_is_not_missed_by_apps_that_connect_directly() -> Result<()> {
    let podman = podman_and_kubectl!();
    let scene = Scene::new(&podman, &overlay("loader")?)?;
    scene.ask()?;
    scene.played.kill(AMBASSADOR, "KILL")?;
    scene.ask().context("by the last good table")?;
    scene.played.restart(AMBASSADOR)?;
    is_ready(&scene.played)?;
    let before = scene.carried_by("direct")?;
    scene.ask()?;
    scene.carries_by("direct", before)?;
    scene.played.delete()
}

#[test]
fn a_conversation_outlives_the_order_to_end() -> Result<()> {
    let podman = podman_and_kubectl!();
    let scene = Scene::new(&podman, &overlay("restricted")?)?;
    let talk = format!("{HALVES}{PORT}");
    let conversation = scene.played.start(APP, &["sh", "-c", &talk])?;
    until_true("the first half", || Ok(conversation.stdout() == "first"))?;
    scene.played.kill(AMBASSADOR, "TERM")?;
    until_true("the drain", || Ok(scene.played.logs(AMBASSADOR)?.contains("draining")))?;
    scene.played.exec(APP, &["sh", "-c", "touch /dev/shm/go"])?.success()?;
    let told = conversation.finish(SOON)?.success()?;
    ensure!(told == "firstsecond", "{told}");
    until_true("the end of the drain", || Ok(scene.played.logs(AMBASSADOR)?.contains("drained")))?;
    scene.played.delete()
}

#[test]
fn two_pods_with_the_same_ports_do_not_meet() -> Result<()> {
    let podman = podman_and_kubectl!();
    let manifest = overlay("accelerated")?;
    let one = Scene::new(&podman, &manifest)?;
    let mut other = Scene::new(&podman, &manifest.replace("name: orders", "name: others"))?;
    one.ask()?;
    other.ask()?;
    other.services.clear();
    ensure!(other.ask().is_err(), "it was answered by somebody else's database");
    one.ask()?;
    other.played.delete()?;
    one.ask().context("once the other Pod is gone")?;
    one.played.delete()
}

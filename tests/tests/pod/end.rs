//! How a Pod ends, and what an app notices when only its ambassador does.

use ambassador_tests::podman::Podman;
use ambassador_tests::process::Process;
use ambassador_tests::wait::{SOON, until_true};
use anyhow::{Context, Result, ensure};

use crate::modes::leaves_nothing;
use crate::{AMBASSADOR, APP, PORT, ROUTE, Scene, is_ready, overlay, podman_and_kubectl};

/// A conversation of the app that takes some time: it says the first half, and the other once it is told to.
const HALVES: &str = "(printf first; while ! test -e /dev/shm/go; do sleep 0.1; done; printf second) | nc 127.0.0.1 ";

#[test]
fn a_killed_sidecar_is_not_missed_by_apps_that_connect_directly() -> Result<()> {
    let podman = podman_and_kubectl!();
    not_missed(&podman, "accelerated")
}

#[test]
fn nor_is_one_without_privileges() -> Result<()> {
    let podman = podman_and_kubectl!();
    not_missed(&podman, "loader")
}

/// What is relayed ends with a sidecar that is killed. What is direct stays, new connections too, and the next
/// sidecar takes over.
fn not_missed(podman: &Podman, mode: &str) -> Result<()> {
    let scene = Scene::new(podman, &overlay(mode)?)?;
    let conversation = first_half(&scene)?;
    // Of another cgroup than the Pod's, so that no hook takes it.
    let relayed = scene.played.inside.enter(|| ROUTE.connect())?;
    relayed.ask(b"question", b"question")?;
    scene.played.kill(AMBASSADOR, "KILL")?;
    relayed.hear_close().context("what was relayed")?;
    scene.ask().context("by the last good table")?;
    scene.played.restart(AMBASSADOR)?;
    is_ready(&scene.played)?;
    let before = scene.carried_by("direct")?;
    scene.ask()?;
    scene.carries_by("direct", before)?;
    second_half(&scene, conversation)?;
    leaves_nothing(podman, scene)
}

#[test]
fn a_conversation_outlives_the_order_to_end() -> Result<()> {
    let podman = podman_and_kubectl!();
    let scene = Scene::new(&podman, &overlay("restricted")?)?;
    let conversation = first_half(&scene)?;
    scene.played.kill(AMBASSADOR, "TERM")?;
    until_true("the drain", || Ok(scene.played.logs(AMBASSADOR)?.contains("draining")))?;
    second_half(&scene, conversation)?;
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

/// A conversation of the app of which the first half is answered.
fn first_half(scene: &Scene<'_>) -> Result<Process> {
    let talk = format!("{HALVES}{PORT}");
    let conversation = scene.played.start(APP, &["sh", "-c", &talk])?;
    until_true("the first half", || Ok(conversation.stdout() == "first"))?;
    Ok(conversation)
}

fn second_half(scene: &Scene<'_>, conversation: Process) -> Result<()> {
    scene.played.exec(APP, &["touch", "/dev/shm/go"])?.success()?;
    let told = conversation.finish(SOON)?.success()?;
    ensure!(told == "firstsecond", "{told}");
    Ok(())
}

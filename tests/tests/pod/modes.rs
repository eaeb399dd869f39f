//! The three ways to deploy: what carries, with which privileges, and what is left on the node.

use std::fs;
use std::path::Path;
use std::process::Command;

use ambassador_tests::podman::Podman;
use ambassador_tests::process::run;
use ambassador_tests::wait::SOON;
use ambassador_tests::{installed, skip};
use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::edit::{container, edited};
use crate::{AMBASSADOR, APP, LOAD, Scene, overlay, pinned, podman_and_kubectl};

const NONE: &str = "0000000000000000";

#[test]
fn restricted_carries_without_any_privilege() -> Result<()> {
    let podman = podman_and_kubectl!();
    let scene = Scene::new(&podman, &overlay("restricted")?)?;
    scene.ask()?;
    scene.carries_by("splice", 0.0)?;
    ensure!(scene.of_process(AMBASSADOR, "CapBnd")? == NONE);
    ensure!(scene.of_process(AMBASSADOR, "Uid")?.starts_with("65532\t"));
    ensure!(scene.of_process(AMBASSADOR, "NoNewPrivs")? == "1");
    let explained = scene.explained()?;
    ensure!(explained.contains("direct: not used"), "{explained}");
    ensure!(pinned(&podman)?.is_empty());
    scene.played.delete()
}

#[test]
fn accelerated_connects_apps_directly_and_keeps_no_privilege() -> Result<()> {
    let podman = podman_and_kubectl!();
    let scene = Scene::new(&podman, &overlay("accelerated")?)?;
    scene.ask()?;
    scene.carries_by("direct", 0.0)?;
    ensure!(scene.carried_by("splice")? == 0.0, "{}", scene.explained()?);
    // The bounding set stays: to lower it takes one more capability, and without new privileges it is idle.
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        ensure!(scene.of_process(AMBASSADOR, set)? == NONE, "{set} is not empty");
    }
    ensure!(scene.of_process(AMBASSADOR, "NoNewPrivs")? == "1");
    let status = scene.status()?;
    ensure!(status["capabilities"] == "none", "{status}");
    leaves_nothing(&podman, scene)
}

#[test]
fn loader_leaves_the_sidecar_without_any_privilege() -> Result<()> {
    let podman = podman_and_kubectl!();
    let scene = Scene::new(&podman, &overlay("loader")?)?;
    scene.ask()?;
    scene.carries_by("direct", 0.0)?;
    ensure!(scene.of_process(AMBASSADOR, "CapBnd")? == NONE);
    ensure!(scene.of_process(AMBASSADOR, "Uid")?.starts_with("65532\t"));
    leaves_nothing(&podman, scene)
}

#[test]
fn the_seccomp_profile_of_the_readme_is_enough_for_the_kernel_tiers() -> Result<()> {
    const DEFAULT: &str = "/usr/share/containers/seccomp.json";
    installed!("jq");
    if !Path::new(DEFAULT).exists() {
        skip!("podman has no profile of seccomp at {DEFAULT}");
    }
    let readme = include_str!("../../../deploy/README.md");
    let filter = readme.split_once("$ jq '").and_then(|(_, rest)| rest.split_once('\''));
    let (filter, _) = filter.context("find the command that makes the profile")?;
    let profile = run(Command::new("jq").args([filter, DEFAULT]), SOON)?;
    let podman = podman_and_kubectl!();
    fs::create_dir_all(podman.seccomp_profiles())?;
    fs::write(podman.seccomp_profiles().join("ambassador.json"), profile)?;
    let narrower = json!({ "type": "Localhost", "localhostProfile": "ambassador.json" });
    for (mode, unconfined) in
        [("accelerated", [AMBASSADOR].as_slice()), ("loader", &[LOAD, AMBASSADOR])]
    {
        let manifest = edited(mode, |pod| {
            unconfined.iter().try_for_each(|name| {
                container(pod, name)?["securityContext"]["seccompProfile"] = narrower.clone();
                Ok(())
            })
        })?;
        let scene = Scene::new(&podman, &manifest)?;
        scene.ask()?;
        scene.carries_by("direct", 0.0)?;
        // A filter is in force.
        ensure!(scene.of_process(AMBASSADOR, "Seccomp")? == "2");
        leaves_nothing(&podman, scene)?;
    }
    Ok(())
}

/// Deletes the Pod: neither pins nor programs on its cgroup stay.
pub(crate) fn leaves_nothing(podman: &Podman, scene: Scene<'_>) -> Result<()> {
    let pod = scene.played.cgroup(APP)?;
    let pod = pod.parent().expect("a container's cgroup has one above it").to_owned();
    let attached = run(Command::new("bpftool").args(["cgroup", "show"]).arg(&pod), SOON)?;
    ensure!(attached.contains("connect4"), "attached elsewhere: {attached}");
    ensure!(!pinned(podman)?.is_empty(), "nothing is pinned");
    scene.played.delete()?;
    let left = pinned(podman)?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    ensure!(!pod.exists(), "{} is still there", pod.display());
    Ok(())
}

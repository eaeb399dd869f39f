//! `ambassador manifest`: the same as the overlays build, and taken by `kubectl patch`.

use std::fs;
use std::process::Command;

use ambassador_tests::ambassador;
use ambassador_tests::installed;
use ambassador_tests::place::Place;
use ambassador_tests::process::{Finished, Process, run};
use ambassador_tests::wait::SOON;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::NOT_A_CONFIGURATION;
use crate::documents::{MODES, ambassadors, build, containers, overlay, pods, root, says};

#[test]
fn what_is_printed_is_what_the_overlays_build() -> Result<()> {
    installed!("kubectl");
    for mode in MODES {
        let printed = says(&manifest(&["--mode", mode, "--route", "5432=db:5432"])?.success()?)?;
        let built = says(&build(&overlay(mode))?)?;
        ensure!(containers(&printed).count() == if mode == "loader" { 2 } else { 1 });
        for printed in containers(&printed) {
            let named = |it: &&Value| it["name"] == printed["name"];
            let mut built = ambassadors(&built).find(named).context("find the container")?.clone();
            let mut printed = printed.clone();
            for (container, key) in [(&mut built, "envFrom"), (&mut printed, "env")] {
                let said = container.as_object_mut().and_then(|it| it.remove(key));
                ensure!(said.is_some(), "{mode}: {key}: {container:#}");
            }
            ensure!(printed == built, "{mode}: {printed:#}\nis not\n{built:#}");
        }
        let volumes = |documents: &[Value]| {
            let mut spec = pods(documents).map(|spec| spec["volumes"].clone());
            spec.next().context("find the volumes")
        };
        ensure!(volumes(&printed)? == volumes(&built)?, "{mode}: the volumes");
    }
    Ok(())
}

#[test]
fn what_is_printed_is_taken_as_a_patch() -> Result<()> {
    installed!("kubectl");
    let scratch = tempfile::tempdir()?;
    let (patch, deployment) =
        (scratch.path().join("sidecar.yaml"), scratch.path().join("app.yaml"));
    let base = fs::read_to_string(root().join("deploy/base/deployment.yaml"))?;
    // One that needs the database before the app does.
    let before = "      initContainers: [{ name: migrate, image: registry.example/migrate:1 }]\n";
    let containers = "      containers:\n";
    ensure!(base.contains(containers));
    fs::write(&deployment, base.replace(containers, &format!("{before}{containers}")))?;
    for mode in MODES {
        let words = ["--deployment", "orders", "--route", "81=db:5432", "--tier", "splice"];
        let printed = manifest(&[&["--mode", mode], &words[..]].concat())?.success()?;
        ensure!(
            printed.contains("# To do: let users other than root listen on port 81"),
            "{printed}"
        );
        fs::write(&patch, &printed)?;
        let mut kubectl = Command::new("kubectl");
        kubectl.args(["patch", "--local", "--output", "json", "--filename"]).arg(&deployment);
        let patched = says(&run(kubectl.arg("--patch-file").arg(&patch), SOON)?)?;
        let names: Vec<_> = containers_of(&patched).collect();
        let expected: &[&str] = match mode {
            "loader" => &["ambassador-load", "ambassador", "migrate", "app"],
            _ => &["ambassador", "migrate", "app"],
        };
        ensure!(names == expected, "{mode}: {names:?}");
        let env = json!([
            { "name": "AMBASSADOR_TIER", "value": "splice" },
            { "name": "AMBASSADOR_ROUTE_0", "value": "81=db:5432" },
        ]);
        for ambassador in ambassadors(&patched) {
            ensure!(ambassador["env"] == env, "{mode}: {ambassador:#}");
        }
    }
    Ok(())
}

#[test]
fn what_would_be_refused_is_not_printed() -> Result<()> {
    let refused = manifest(&["--route", "5432=db"])?;
    ensure!(
        refused.code() == Some(NOT_A_CONFIGURATION) && refused.stdout.is_empty(),
        "{refused:?}"
    );
    ensure!(refused.stderr.contains("--route: \"db\" has no port"), "{refused:?}");
    Ok(())
}

fn containers_of(documents: &[Value]) -> impl Iterator<Item = &str> {
    containers(documents).filter_map(|it| it["name"].as_str())
}

fn manifest(words: &[&str]) -> Result<Finished> {
    let mut command = ambassador::command(&Place::here())?;
    // Of where it is printed, which says nothing about where it runs.
    command.env("AMBASSADOR_TIER", "copy").env("AMBASSADOR_ROUTE_7", "7=no:7");
    Process::start(command.arg("manifest").args(words))?.finish(SOON)
}

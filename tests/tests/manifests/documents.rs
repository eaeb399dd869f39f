//! The YAML below `deploy/`, as written and as kustomize builds it, and what is in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ambassador_tests::process::run;
use ambassador_tests::wait::SOON;
use anyhow::{Context, Result, ensure};
use serde_json::Value;

pub(crate) const MODES: [&str; 3] = ["restricted", "accelerated", "loader"];

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

pub(crate) fn overlay(mode: &str) -> PathBuf {
    root().join("deploy/overlays").join(mode)
}

/// Every file and its text.
pub(crate) fn texts() -> Result<Vec<(PathBuf, String)>> {
    let mut unseen = vec![root().join("deploy")];
    let mut found = Vec::new();
    while let Some(directory) = unseen.pop() {
        for entry in fs::read_dir(&directory).context("list a directory of deploy/")? {
            let path = entry?.path();
            if path.is_dir() {
                unseen.push(path);
            } else if path.extension().is_some_and(|it| it == "yaml") {
                let text = fs::read_to_string(&path)?;
                found.push((path, text));
            }
        }
    }
    found.sort();
    ensure!(found.len() >= 18, "only {} manifests", found.len());
    Ok(found)
}

/// What a file says.
pub(crate) fn says(text: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).context("parse YAML")?;
    for document in &documents {
        ensure!(!document["kind"].is_null() && !document["apiVersion"].is_null(), "{document}");
    }
    ensure!(!documents.is_empty(), "nothing is said");
    Ok(documents)
}

pub(crate) fn examples() -> Result<Vec<(PathBuf, Vec<Value>)>> {
    let examples = texts()?
        .into_iter()
        .filter(|(path, _)| path.parent().is_some_and(|it| it.ends_with("examples")));
    examples.map(|(path, text)| Ok((path, says(&text)?))).collect()
}

/// What kustomize makes of a directory.
pub(crate) fn build(directory: &Path) -> Result<String> {
    run(Command::new("kubectl").arg("kustomize").arg(directory), SOON)
}

pub(crate) fn of_kind<'d>(documents: &'d [Value], kind: &str) -> impl Iterator<Item = &'d Value> {
    documents.iter().filter(move |it| it["kind"] == kind)
}

/// The `spec` of each Pod, also of those that something else makes.
pub(crate) fn pods(documents: &[Value]) -> impl Iterator<Item = &Value> {
    documents.iter().filter_map(|document| match document["kind"].as_str() {
        Some("Pod") => document.get("spec"),
        Some("Deployment" | "Job") => document.pointer("/spec/template/spec"),
        _ => None,
    })
}

pub(crate) fn containers(documents: &[Value]) -> impl Iterator<Item = &Value> {
    pods(documents).flat_map(|spec| {
        ["initContainers", "containers"]
            .into_iter()
            .filter_map(|kind| spec[kind].as_array())
            .flatten()
    })
}

/// Those that run the ambassador.
pub(crate) fn ambassadors(documents: &[Value]) -> impl Iterator<Item = &Value> {
    containers(documents).filter(|it| it["image"] == "localhost/ambassador:latest")
}

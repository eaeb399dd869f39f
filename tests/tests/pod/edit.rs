//! Shipped manifests, with as little changed as a test is about.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::overlay;

/// What is shipped for a mode, with another specification of its Pod.
pub(crate) fn edited(mode: &str, change: impl FnOnce(&mut Value) -> Result<()>) -> Result<String> {
    changed(&overlay(mode)?, change)
}

/// A manifest with another specification of its Pod.
pub(crate) fn changed(
    manifest: &str,
    change: impl FnOnce(&mut Value) -> Result<()>,
) -> Result<String> {
    let mut documents = documents(manifest)?;
    let pod = documents.iter_mut().find(|it| it["kind"] == "Deployment" || it["kind"] == "Pod");
    let pod = pod.context("find the Pod")?;
    let spec = if pod["kind"] == "Pod" { "/spec" } else { "/spec/template/spec" };
    change(pod.pointer_mut(spec).context("find the Pod's specification")?)?;
    Ok(text(&documents))
}

pub(crate) fn documents(manifest: &str) -> Result<Vec<Value>> {
    serde_saphyr::from_multiple(manifest).context("read the manifest")
}

pub(crate) fn text(documents: &[Value]) -> String {
    documents.iter().map(|document| format!("---\n{document}\n")).collect()
}

/// A container that begins before the app's.
pub(crate) fn container<'v>(pod: &'v mut Value, name: &str) -> Result<&'v mut Value> {
    named(&mut pod["initContainers"], name)
}

/// That of a list which has this name.
pub(crate) fn named<'v>(list: &'v mut Value, name: &str) -> Result<&'v mut Value> {
    let mut list = list.as_array_mut().into_iter().flatten();
    list.find(|it| it["name"] == name).with_context(|| format!("find {name}"))
}

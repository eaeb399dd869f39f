//! Volumes of ConfigMaps, Secrets and the downward API, as the kubelet lays them out: files are links through
//! `..data`, a link to a directory of one version, so that what is mounted changes at once. podman knows no
//! such thing.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// The files of a volume, by their names.
pub(super) type Files = BTreeMap<String, String>;

const CURRENT: &str = "..data";
/// What is projected, where it has its files; the volume's key, and what names it there.
const KINDS: [(&str, &str, &str, &str); 2] =
    [("ConfigMap", "data", "configMap", "name"), ("Secret", "stringData", "secret", "secretName")];

/// What a volume shows of these documents, or of its Pod's namespace, if it is of that kind.
pub(super) fn files(volume: &Value, documents: &[Value], namespace: &str) -> Result<Option<Files>> {
    if let Some(items) = volume["downwardAPI"]["items"].as_array() {
        let file = |item: &Value| {
            let field = &item["fieldRef"]["fieldPath"];
            ensure!(field == "metadata.namespace", "no Pod is told of {field} here");
            let path = item["path"].as_str().context("find where that is told")?;
            Ok((path.to_owned(), namespace.to_owned()))
        };
        return items.iter().map(file).collect::<Result<_>>().map(Some);
    }
    for (kind, files, key, name) in KINDS {
        let Some(source) = volume.get(key) else { continue };
        let wanted = &source[name];
        let is_it = |it: &&Value| it["kind"] == kind && it["metadata"]["name"] == *wanted;
        return match documents.iter().find(is_it) {
            Some(found) => {
                let files = serde_json::from_value(found[files].clone());
                files.map(Some).with_context(|| format!("read the files of {kind} {wanted}"))
            }
            None if source["optional"] == true => Ok(Some(Files::new())),
            None => bail!("{kind} {wanted} is not in the manifest"),
        };
    }
    Ok(None)
}

/// Has a directory show these files and no others, from one moment to the next.
pub(super) fn show(directory: &Path, files: &Files) -> Result<()> {
    lay_out(directory, files).with_context(|| format!("lay out {}", directory.display()))
}

fn lay_out(directory: &Path, files: &Files) -> Result<()> {
    let current = directory.join(CURRENT);
    let before = fs::read_link(&current).ok();
    let number = before.as_ref().and_then(|it| it.to_str()?.trim_start_matches('.').parse().ok());
    let version = format!("..{}", number.unwrap_or(0_u32) + 1);
    fs::create_dir_all(directory.join(&version)).context("make the version's directory")?;
    for (name, text) in files {
        fs::write(directory.join(&version).join(name), text).context("write a file")?;
    }
    let new = directory.join("..data_tmp");
    symlink(&version, &new).context("link to the version")?;
    fs::rename(&new, &current).context("put the version in force")?;
    let mut missing = files.clone();
    for entry in fs::read_dir(directory).context("list what is there")? {
        let name = entry.context("list what is there")?.file_name();
        let name = name.to_str().context("read a name")?;
        if !name.starts_with("..") && missing.remove(name).is_none() {
            fs::remove_file(directory.join(name)).context("remove what is no more")?;
        }
    }
    for name in missing.keys() {
        symlink(Path::new(CURRENT).join(name), directory.join(name)).context("link a file")?;
    }
    before.map_or(Ok(()), |before| {
        fs::remove_dir_all(directory.join(before)).context("remove the version before")
    })
}

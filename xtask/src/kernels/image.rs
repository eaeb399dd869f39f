//! The kernels of Debian that machines are started with: downloaded once, and kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{command, packages, workspace};

/// The newest kernel of a series, such as `6.1`, that Debian has for clouds: everything it takes is
/// built in. Downloaded once.
pub(super) fn newest(series: &str) -> Result<PathBuf> {
    let cache = workspace::root().join("target/kernels");
    fs::create_dir_all(&cache).context("create the directory of kernels")?;
    let prefix = format!("linux-image-{series}.");
    let Some(package) = packages::newest(&prefix, "-cloud-amd64")? else {
        return cached(&cache, series)?
            .with_context(|| format!("apt knows no {prefix}*-cloud-amd64; is its list fetched?"));
    };
    let image = cache.join(package.replacen("linux-image", "vmlinuz", 1));
    if image.is_file() {
        return Ok(image);
    }
    match unpacked(&package, &cache, &image) {
        Ok(()) => Ok(image),
        Err(error) => cached(&cache, series)?.ok_or(error),
    }
}

/// A kernel of the series that was downloaded before.
fn cached(cache: &Path, series: &str) -> Result<Option<PathBuf>> {
    let prefix = format!("vmlinuz-{series}.");
    let entries = fs::read_dir(cache).context("list the kernels that are here")?;
    let of_series = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
    };
    Ok(entries.flatten().map(|entry| entry.path()).find(of_series))
}

fn unpacked(package: &str, cache: &Path, image: &Path) -> Result<()> {
    // Beside the image, which then appears in one step.
    let scratch = tempfile::tempdir_in(cache).context("create a directory to unpack a kernel")?;
    let archive = packages::download(package, scratch.path())?;
    let root = scratch.path().join("root");
    command::run(Command::new("dpkg-deb").arg("--extract").args([&archive, &root]))?;
    let name = image.file_name().context("name the kernel's image")?;
    fs::rename(root.join("boot").join(name), image).context("keep the kernel's image")
}

//! Where things are: the workspace's root, and the compiler's name for this machine.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

/// The directory of the workspace's `Cargo.toml`.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace's root")
}

/// The workspace's compiler.
pub(crate) fn rustc() -> Command {
    Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
}

/// The target triple that the workspace's compiler builds for when it is not told.
pub(crate) fn host_triple() -> Result<String> {
    let version = crate::command::stdout_of(rustc().arg("-vV"))?;
    version
        .lines()
        .find_map(|line| line.strip_prefix("host: "))
        .map(str::to_owned)
        .context("find the host triple in `rustc -vV`")
}

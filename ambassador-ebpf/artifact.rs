//! The built eBPF object as a file: where it lies, and which sources it was made from.
//!
//! One text for two programs, which must agree: `cargo xtask build-ebpf` writes the artifact, and
//! the build script of the user half embeds it if it is there and current.

use std::io::Result;
use std::path::{Path, PathBuf};
use std::{env, fs};

use sha2::{Digest, Sha256};

/// Overrides the directory of the artifacts, `target/bpf` in the workspace.
pub(crate) const DIRECTORY: &str = "AMBASSADOR_BPF_DIR";

/// The object for one byte order, and beside it the fingerprint of its sources.
pub(crate) struct Artifact {
    pub(crate) object: PathBuf,
    pub(crate) fingerprint: PathBuf,
}

impl Artifact {
    /// The artifact of a target, `bpfel` or `bpfeb`, whether it has been built or not.
    pub(crate) fn of(workspace: &Path, target: &str) -> Self {
        let directory = directory(workspace);
        Self {
            object: directory.join(format!("ambassador.{target}.o")),
            fingerprint: directory.join(format!("ambassador.{target}.sources")),
        }
    }
}

/// The directory of the artifacts; nothing else lies in it.
pub(crate) fn directory(workspace: &Path) -> PathBuf {
    match env::var_os(DIRECTORY) {
        Some(directory) => workspace.join(directory),
        None => workspace.join("target/bpf"),
    }
}

/// What an object depends on, relative to the workspace.
pub(crate) const INPUTS: [&str; 3] =
    ["ambassador-ebpf/Cargo.toml", "ambassador-ebpf/src", "Cargo.lock"];

/// The SHA-256 of everything an object is made from.
pub(crate) fn fingerprint(workspace: &Path) -> Result<String> {
    let [manifest, sources, lock] = INPUTS.map(|input| workspace.join(input));
    let mut files = vec![manifest];
    files_below(&sources, &mut files)?;
    files.sort();

    let mut hash = Sha256::new();
    for file in files {
        let content = fs::read(&file)?;
        let name = file.strip_prefix(workspace).unwrap_or(&file);
        hash.update(format!("{} {}\n", name.display(), content.len()));
        hash.update(content);
    }
    hash.update(kernel_side_versions(&fs::read_to_string(lock)?));
    Ok(hex(hash))
}

/// The SHA-256 of some bytes.
pub(crate) fn digest(bytes: &[u8]) -> String {
    hex(Sha256::new().chain_update(bytes))
}

fn hex(hash: Sha256) -> String {
    format!("{:x}", hash.finalize())
}

fn files_below(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            files_below(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// The locked versions of the crates that end up in the object.
fn kernel_side_versions(lock: &str) -> String {
    lock.split("[[package]]").filter(|package| package.contains("name = \"aya-ebpf")).collect()
}

//! The built eBPF object as a file: where it lies, and what it was made from.
//!
//! One text for two programs, which must agree: `cargo xtask build-ebpf` writes the artifact, and
//! the build script of the user half embeds it if it is there and current.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Result;
use std::path::{Path, PathBuf};
use std::{env, fs};

use sha2::{Digest, Sha256};

/// Overrides the directory of the artifacts, `target/bpf` in the workspace.
pub(crate) const DIRECTORY: &str = "AMBASSADOR_BPF_DIR";

/// The object for one kind of machine, and beside it the fingerprint of its sources.
pub(crate) struct Artifact {
    pub(crate) object: PathBuf,
    pub(crate) fingerprint: PathBuf,
}

impl Artifact {
    /// The artifact of a target, such as `bpfel-x86_64`, whether it has been built or not.
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

/// What an object depends on, relative to the workspace: the sources, what tells cargo how to
/// build them, and parts of two more.
pub(crate) const INPUTS: [&str; 6] = [
    "ambassador-ebpf/Cargo.toml",
    "ambassador-ebpf/src",
    "xtask/src/build_ebpf.rs",
    "xtask/src/toolchain.rs",
    "Cargo.toml",
    "Cargo.lock",
];

/// The SHA-256 of everything an object is made from, but for the compiler.
pub(crate) fn fingerprint(workspace: &Path) -> Result<String> {
    let [whole @ .., manifest, lock] = INPUTS.map(|input| workspace.join(input));
    let mut files = Vec::new();
    for input in whole {
        files_below(input, &mut files)?;
    }
    files.sort();

    let mut hash = Sha256::new();
    for file in files {
        let content = fs::read(&file)?;
        let name = file.strip_prefix(workspace).unwrap_or(&file);
        hash.update(format!("{} {}\n", name.display(), content.len()));
        hash.update(content);
    }
    hash.update(profiles(&fs::read_to_string(manifest)?));
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

fn files_below(path: PathBuf, files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            files_below(entry?.path(), files)?;
        }
    } else {
        files.push(path);
    }
    Ok(())
}

/// The profiles of the workspace's manifest: that of the object, and what it inherits.
fn profiles(manifest: &str) -> String {
    manifest
        .split_inclusive('\n')
        .fold((false, String::new()), |(inside, profiles), line| {
            let inside = if line.starts_with('[') { line.starts_with("[profile.") } else { inside };
            (inside, if inside { profiles + line } else { profiles })
        })
        .1
}

/// The locked versions of the crates that end up in the object, and of what makes them.
fn kernel_side_versions(lock: &str) -> String {
    let mut packages = BTreeMap::<_, Vec<_>>::new();
    for package in lock.split("[[package]]\n") {
        let name = package.strip_prefix("name = \"").and_then(|rest| rest.split('"').next());
        packages.entry(name.unwrap_or_default()).or_default().push(package);
    }
    let mut wanted = vec!["ambassador-ebpf"];
    let mut found = BTreeSet::new();
    while let Some(name) = wanted.pop() {
        // What was there already has been found before.
        for package in packages.remove(name).into_iter().flatten() {
            found.insert(package);
            // A dependency is named ` "name",`, or ` "name version",` where there are several.
            let dependencies = package.lines().filter_map(|line| line.strip_prefix(" \""));
            let names = dependencies.filter_map(|line| line.split(['"', ' ']).next());
            // aya is the host's half of the contract.
            wanted.extend(names.filter(|&name| name != "aya"));
        }
    }
    found.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_a_part_of_the_fingerprint_and_a_dependency_is_not() {
        let manifest = "[profile.release]\nlto = true\n[other]\nx = 1\n[profile.bpf]\ndebug = 2\n";
        assert_eq!(profiles(manifest), "[profile.release]\nlto = true\n[profile.bpf]\ndebug = 2\n");
    }

    #[test]
    fn the_kernel_side_is_what_the_ebpf_package_depends_on_in_the_end() {
        let package = |name: &str, dependencies: &str| {
            format!("[[package]]\nname = \"{name}\"\ndependencies = [\n{dependencies}]\n\n")
        };
        let lock = [
            package("ambassador-ebpf", " \"aya\",\n \"aya-ebpf\",\n"),
            package("aya", " \"host\",\n"),
            package("aya-ebpf", " \"macros 2.0.0\",\n"),
            package("host", ""),
            package("macros", ""),
        ]
        .concat();
        let versions = kernel_side_versions(&lock);
        let has = |name: &str| versions.contains(&format!("name = \"{name}\""));
        assert!(has("ambassador-ebpf") && has("aya-ebpf") && has("macros"), "{versions}");
        assert!(!has("aya") && !has("host"), "{versions}");
    }
}

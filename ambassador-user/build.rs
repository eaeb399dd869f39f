//! Embeds the eBPF object, if `cargo xtask build-ebpf` has made one of the sources as they are.
//!
//! Without it the build succeeds all the same, and yields a binary without kernel tiers.

#[path = "../ambassador-ebpf/artifact.rs"]
mod artifact;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use artifact::Artifact;

fn main() -> Result<(), Box<dyn Error>> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let byte_order = match env::var("CARGO_CFG_TARGET_ENDIAN")?.as_str() {
        "big" => "bpfeb",
        _ => "bpfel",
    };
    let target = format!("{byte_order}-{}", env::var("CARGO_CFG_TARGET_ARCH")?);
    watch(&workspace);

    println!("cargo:rustc-check-cfg=cfg(bpf_object)");
    if let Some(bytes) = current(&workspace, &Artifact::of(&workspace, &target))? {
        fs::write(PathBuf::from(env::var("OUT_DIR")?).join("ambassador.o"), &bytes)?;
        println!("cargo:rustc-env=AMBASSADOR_BPF_SHA256={}", artifact::digest(&bytes));
        println!("cargo:rustc-cfg=bpf_object");
    }
    Ok(())
}

/// The object's bytes; nothing if it has not been built, or was built from other sources.
fn current(workspace: &Path, artifact: &Artifact) -> Result<Option<Vec<u8>>, Box<dyn Error>> {
    if !artifact.object.exists() {
        return Ok(None);
    }
    let bytes = fs::read(&artifact.object)?;
    let sources = fs::read_to_string(&artifact.fingerprint).unwrap_or_default();
    if sources == artifact::fingerprint(workspace)? {
        return Ok(Some(bytes));
    }
    println!(
        "cargo:warning=the eBPF object was made from other sources, so the kernel tiers are left \
         out; build it again with `cargo xtask build-ebpf`"
    );
    Ok(None)
}

/// Names what this script depends on.
fn watch(workspace: &Path) {
    println!("cargo:rerun-if-env-changed={}", artifact::DIRECTORY);
    for input in artifact::INPUTS {
        println!("cargo:rerun-if-changed={}", workspace.join(input).display());
    }
    // A path that does not exist makes cargo run this script, and rebuild the crate, every time;
    // so the directory is watched, and made. Where it cannot be made, no object will appear.
    let directory = artifact::directory(workspace);
    if fs::create_dir_all(&directory).is_ok() {
        println!("cargo:rerun-if-changed={}", directory.display());
    }
}

//! `cargo xtask image`: the product as an OCI image: the static binary, CA roots, nothing else. It is
//! written here, without a builder or a daemon; of the same binary it has the same bytes.

mod oci;

use std::env::consts::ARCH;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;
use pem::{EncodeConfig, LineEnding, Pem};

use crate::command::{stdout_of, step};
use crate::toolchain::Target;
use crate::{build_ebpf, release, setup, workspace};
use oci::{Entry, Image};

/// The user of the container, as deploy/ has it: nobody that a node knows.
const USER: &str = "65532:65532";
/// What the image may be at most, compressed.
const MOST_BYTES: u64 = 12 << 20;
/// Where Go, OpenSSL and rustls look first.
const ROOTS: &str = "etc/ssl/certs/ca-certificates.crt";

#[derive(Args)]
pub(crate) struct Options {
    /// The machine it is for
    #[arg(long, default_value = ARCH, value_parser = ["x86_64", "aarch64"])]
    arch: String,
    /// Where the archive goes [default: target/image/ambassador-ARCH.oci.tar]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Builds the binary, writes the archive, and says how to use it.
pub(crate) fn run(Options { arch, out }: &Options) -> Result<()> {
    // Without the kernel half it would be a slower product that nobody asked for.
    let toolchain = setup::toolchain().context("an image has the kernel tiers")?;
    build_ebpf::build(&toolchain, &Target::of_image(arch))?;
    let binary = release::build_for(arch)?;
    step("write the image");
    let directory = workspace::root().join("target/image");
    let context = directory.join(arch);
    fs::create_dir_all(&context).with_context(|| format!("make {}", context.display()))?;
    // For deploy/Containerfile.
    fs::copy(&binary, context.join("ambassador")).context("copy the binary")?;
    fs::write(context.join("ca-certificates.crt"), roots()).context("write the roots")?;
    let out = out.clone().unwrap_or_else(|| directory.join(format!("ambassador-{arch}.oci.tar")));
    let digest = write(&binary, arch, &out)?;
    let bytes = fs::metadata(&out).with_context(|| format!("look at {}", out.display()))?.len();
    ensure!(bytes <= MOST_BYTES, "the image has {bytes} bytes, more than {MOST_BYTES}");
    println!(
        "{path}: {:.1} MiB, {digest}\n  podman load -i {path}\n  ctr -n k8s.io images import {path}\n  \
         skopeo copy oci-archive:{path} docker://REGISTRY/ambassador:{version}",
        bytes as f64 / f64::from(1 << 20),
        path = out.display(),
        version = env!("CARGO_PKG_VERSION"),
    );
    Ok(())
}

/// Writes the archive of a binary; returns the digest of the image's manifest.
pub(crate) fn write(binary: &Path, arch: &str, out: &Path) -> Result<String> {
    let program = fs::read(binary).with_context(|| format!("read {}", binary.display()))?;
    ensure!(is_static(&program)?, "{} is not linked statically", binary.display());
    let version = env!("CARGO_PKG_VERSION");
    let mut labels = vec![
        ("org.opencontainers.image.title", "ambassador".to_owned()),
        (
            "org.opencontainers.image.description",
            "A Pod's localhost connections, carried to the real service".to_owned(),
        ),
        ("org.opencontainers.image.version", version.to_owned()),
        ("org.opencontainers.image.licenses", "MIT OR Apache-2.0".to_owned()),
    ];
    labels.extend(revision().map(|it| ("org.opencontainers.image.revision", it)));
    let image = Image {
        name: format!("localhost/ambassador:{version}"),
        architecture: if arch == "aarch64" { "arm64" } else { "amd64" },
        files: vec![
            Entry { path: "ambassador", mode: 0o755, bytes: program },
            Entry { path: ROOTS, mode: 0o644, bytes: roots().into_bytes() },
        ],
        user: USER,
        // What a manifest's `args` replace is the command, so that they may name another.
        entrypoint: &["/ambassador"],
        command: &["run"],
        labels,
    };
    image.write(out).with_context(|| format!("write {}", out.display()))
}

/// Whether a program needs no other file to run: it names no interpreter.
fn is_static(program: &[u8]) -> Result<bool> {
    use object::read::elf::{ElfFile64, ProgramHeader};
    let file: ElfFile64 = ElfFile64::parse(program).context("read the binary as ELF")?;
    let endian = file.endian();
    Ok(!file.elf_program_headers().iter().any(|it| it.p_type(endian) == object::elf::PT_INTERP))
}

/// Mozilla's, of the version that Cargo.lock has.
fn roots() -> String {
    let roots: Vec<_> = webpki_root_certs::TLS_SERVER_ROOT_CERTS
        .iter()
        .map(|root| Pem::new("CERTIFICATE", root.as_ref()))
        .collect();
    pem::encode_many_config(&roots, EncodeConfig::new().set_line_ending(LineEnding::LF))
}

/// The commit, of a tree without changes.
fn revision() -> Option<String> {
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        stdout_of(git.arg("-C").arg(workspace::root()).args(arguments)).ok()
    };
    let changes = git(&["status", "--porcelain", "--untracked-files=no"])?;
    let commit = git(&["rev-parse", "HEAD"])?;
    changes.is_empty().then(|| commit.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_that_needs_libraries_is_refused() -> Result<()> {
        // This test itself is one.
        let own = std::env::current_exe()?;
        let refused = write(&own, ARCH, Path::new("/nonexistent/image")).unwrap_err();
        assert!(refused.to_string().contains("not linked statically"), "{refused:#}");
        Ok(())
    }

    #[test]
    fn there_are_roots() {
        assert!(roots().matches("-----BEGIN CERTIFICATE-----\n").count() > 100);
    }
}

//! `cargo xtask setup`: finds, or else installs, what the eBPF build and the tests need.
//!
//! What is there already is taken. What is missing comes from apt where that is possible (root on
//! Debian), because its compiler, `core` and LLVM are made for each other; otherwise from rustup
//! and crates.io. What cannot be installed is named, with the command that would install it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{self, cargo, step};
use crate::toolchain::{Compiler, Linker, Target, Toolchain};
use crate::{build_ebpf, packages};

/// The release of the linker that the workspace is built with.
const LINKER: &str = "0.13.0";

/// Everything, for everyone.
pub(crate) fn run() -> Result<()> {
    let toolchain = toolchain();
    let servers = peers("the tests", packages::FOR_TESTS);
    let machines = peers("other kernels", packages::FOR_KERNELS);
    toolchain?;
    servers?;
    machines
}

/// The eBPF object for the binary built next, where it can be had; says why where it cannot.
pub(crate) fn kernel_half() -> Result<()> {
    match toolchain() {
        Ok(toolchain) => build_ebpf::build(&toolchain, &Target::host()).map(drop),
        Err(error) => {
            eprintln!("xtask: kernel tiers left out: {error:#}");
            Ok(())
        }
    }
}

/// The eBPF toolchain: found, or else installed.
pub(crate) fn toolchain() -> Result<Toolchain> {
    if let Some(found) = Toolchain::find() {
        eprintln!("eBPF toolchain, already here: {found}");
        return Ok(found);
    }
    let compiler = match Compiler::find() {
        Some(found) => found,
        None => install_compiler()?,
    };
    let linker = match Linker::find() {
        Some(found) => found,
        None => install_linker(&compiler)?,
    };
    let toolchain = Toolchain { compiler, linker };
    eprintln!("eBPF toolchain: {toolchain}");
    Ok(toolchain)
}

/// The real servers and tools that something uses.
pub(crate) fn peers(of: &str, packages: &[&str]) -> Result<()> {
    let missing = packages::missing(packages);
    if missing.is_empty() {
        eprintln!("peers for {of}, already here: {}", packages.join(" "));
        return Ok(());
    }
    if !packages::installable() {
        bail!("peers for {of} are missing; as root: {}", packages::advice(&missing));
    }
    step(&format!("install peers for {of}: {}", missing.join(" ")));
    packages::install(&missing).with_context(|| format!("install peers for {of}"))
}

fn install_compiler() -> Result<Compiler> {
    if packages::installable() {
        step("install a compiler for BPF from Debian, which brings a precompiled core");
        match packages::install(packages::COMPILER) {
            Ok(()) => {
                if let Some(found) = Compiler::find() {
                    return Ok(found);
                }
                eprintln!("xtask: Debian's compiler here is too old, or lacks core for BPF");
            }
            Err(error) => eprintln!("xtask: {error:#}"),
        }
    }
    step("install a nightly compiler with the source of core by rustup");
    let mut rustup = Command::new("rustup");
    rustup.args(["toolchain", "install", "nightly", "--profile", "minimal"]);
    rustup.args(["--component", "rust-src", "--component", "clippy"]);
    let installed = command::run(&mut rustup);
    match Compiler::find() {
        Some(found) => Ok(found),
        None => Err(installed
            .err()
            .unwrap_or_else(|| anyhow::anyhow!("rustup left none"))
            .context(format!(
                "no compiler for BPF; install one with `{}`, or on Debian as root: {}",
                command::shown(&rustup),
                packages::advice(packages::COMPILER)
            ))),
    }
}

/// Builds the linker against the LLVM of the compiler whose bitcode it is to read.
fn install_linker(compiler: &Compiler) -> Result<Linker> {
    let major = compiler.llvm();
    let development = format!("llvm-{major}-dev");
    let needed = [development.as_str(), "g++"];
    let prefix = match llvm_prefix(major) {
        Some(prefix) => prefix,
        None if packages::installable() => {
            step(&format!("install LLVM {major} for the BPF linker"));
            packages::install(&needed).context("install LLVM for the BPF linker")?;
            llvm_prefix(major).with_context(|| format!("find LLVM {major} after installing it"))?
        }
        None => bail!(
            "no bpf-linker, and no LLVM {major} to build it with; put a release of bpf-linker on \
             the PATH, or as root: {}",
            packages::advice(&needed)
        ),
    };

    step(&format!("build bpf-linker {LINKER} against LLVM {major} (about a minute)"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = [prefix.join("bin")].into_iter().chain(std::env::split_paths(&path));
    let mut install = cargo();
    install.args(["install", "bpf-linker", "--version", LINKER, "--locked"]);
    install.args(["--no-default-features", "--features", &format!("llvm-{major}")]);
    install.env("LLVM_PREFIX", &prefix);
    install.env(format!("LLVM_SYS_{major}1_PREFIX"), &prefix);
    install.env("PATH", std::env::join_paths(path).context("extend the search path by LLVM")?);
    command::run(&mut install).context("install the BPF linker")?;
    Linker::find().context("find the BPF linker after installing it")
}

/// The directory that holds an LLVM of this major version with its headers.
fn llvm_prefix(major: u32) -> Option<PathBuf> {
    let of_debian = PathBuf::from(format!("/usr/lib/llvm-{major}"));
    if of_debian.join("bin/llvm-config").is_file() && of_debian.join("include/llvm-c").exists() {
        return Some(of_debian);
    }
    let ask = |question| {
        let output = Command::new("llvm-config").arg(question).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let matches = ask("--version")?.starts_with(&format!("{major}."));
    matches.then(|| ask("--prefix"))?.map(|prefix| Path::new(&prefix).to_owned())
}

//! `cargo xtask check`: formatting, lints on both halves, unit tests and the house rules.

use anyhow::{Context, Result};

use crate::command::{self, cargo, step};
use crate::toolchain::{Target, Toolchain};
use crate::{build_ebpf, cost, tidy};

/// Runs every check that needs no privileges; stops at the first that fails.
pub(crate) fn run() -> Result<()> {
    step("formatting");
    command::run(cargo().args(["fmt", "--all", "--check"])).context("run `cargo fmt`")?;

    step("lints, host");
    let mut clippy = cargo();
    clippy.args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    command::run(&mut clippy)?;

    kernel_half()?;

    step("unit tests");
    command::run(cargo().args(["test", "--workspace", "--lib", "--bins"]))?;

    step("house rules");
    tidy::run()
}

/// The hooks' bodies, which the host's lints do not see.
fn kernel_half() -> Result<()> {
    let Some(toolchain) = Toolchain::find() else {
        eprintln!("xtask: eBPF lints left out: no eBPF toolchain here; see `cargo xtask setup`");
        return Ok(());
    };
    if toolchain.compiler.has_clippy() {
        step("lints, eBPF");
        command::run(toolchain.cargo("clippy", &Target::host()).args(["--", "-D", "warnings"]))?;
    } else {
        step("types, eBPF (its compiler has no clippy here)");
        command::run(&mut toolchain.cargo("check", &Target::host()))?;
    }
    // Cheap, and nobody would notice otherwise before the release.
    for other in Target::others() {
        build_ebpf::build(&toolchain, &other)?;
    }
    cost::compare(&build_ebpf::build(&toolchain, &Target::host())?)
}

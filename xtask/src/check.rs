//! `cargo xtask check`: formatting, lints and unit tests.

use anyhow::Result;

use crate::command::{cargo, step};

/// Runs every check that needs no privileges; stops at the first that fails.
pub(crate) fn run() -> Result<()> {
    step("formatting");
    run_cargo(&["fmt", "--all", "--check"])?;
    step("lints, host");
    run_cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    step("unit tests");
    run_cargo(&["test", "--workspace", "--lib", "--bins"])
}

fn run_cargo(arguments: &[&str]) -> Result<()> {
    crate::command::run(cargo().args(arguments))
}

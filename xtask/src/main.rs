//! `cargo xtask`: what cargo cannot do. One file per command, one line per command here.

#[path = "../../ambassador-ebpf/artifact.rs"]
mod artifact;
mod bench;
mod build_ebpf;
mod check;
mod command;
mod cost;
mod demo;
mod image;
mod kernels;
mod packages;
mod release;
mod setup;
mod test;
mod tidy;
mod toolchain;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

use crate::toolchain::Target;

/// Builds, checks and proves the workspace.
#[derive(Parser)]
#[command(name = "xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
enum Task {
    /// Find, or else install, what the eBPF build and the tests need
    Setup,
    /// Build the kernel half, for the user half to embed
    BuildEbpf(Target),
    /// Format, lints, unit tests and the house rules: everything that needs no privileges
    Check,
    /// Builds the product and shows what every tier that works here does with real traffic
    Demo,
    /// The ambassador beside no proxy and other proxies, measured in one interleaved run
    Bench(bench::Options),
    /// The product as an OCI image
    Image(image::Options),
    /// The product on Debian's other kernels, in virtual machines, and on this one: a Markdown table
    Kernels,
    /// Every test, against real peers where they are there; closes with one line of totals
    Test,
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Setup => setup::run(),
        Task::BuildEbpf(target) => build_ebpf::run(&target),
        Task::Check => check::run(),
        Task::Demo => demo::run(),
        Task::Bench(options) => bench::run(&options),
        Task::Image(options) => image::run(&options),
        Task::Kernels => kernels::run(),
        Task::Test => test::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

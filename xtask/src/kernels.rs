//! `cargo xtask kernels`: what works on which kernel. Debian's 6.1 and 6.12 run in virtual machines,
//! one after the other; this machine's comes last.

mod image;
mod luggage;
mod machine;
mod matrix;
mod visit;

use std::env;
use std::path::{Path, PathBuf};

use ambassador_tests::ambassador::BINARY;
use anyhow::{Result, ensure};

use crate::command::step;
use crate::{packages, release, setup};
use luggage::Luggage;
use matrix::Matrix;
use visit::Visit;

/// The series of kernels that Debian has for clouds.
const SERIES: [&str; 2] = ["6.1", "6.12"];
/// The behaviours that every kernel is tried with: those that would find a byte lost, and those that an app would
/// notice.
const SUITES: [&str; 2] = ["torture", "app"];

/// What there is to say of one kernel.
pub(crate) enum Verdict {
    Passed,
    Failed(String),
    Skipped(String),
}

/// Builds what is to be tried, or takes the static binary that the environment names, and prints
/// the table.
pub(crate) fn run() -> Result<()> {
    let binary = match env::var_os(BINARY) {
        Some(path) => PathBuf::from(path),
        None => {
            setup::kernel_half()?;
            release::build()?
        }
    };
    let mut failed = 0;
    for (kernel, verdict) in visit(&binary)? {
        match verdict {
            Verdict::Passed => {}
            Verdict::Failed(why) => {
                failed += 1;
                eprintln!("xtask: {kernel}: {why}");
            }
            Verdict::Skipped(why) => eprintln!("xtask: {kernel} is left out: {why}"),
        }
    }
    ensure!(failed == 0, "{failed} kernels failed");
    Ok(())
}

/// Takes a static binary to every kernel that can be had here, prints the table of what works where,
/// and returns the verdict on each.
pub(crate) fn visit(binary: &Path) -> Result<Vec<(String, Verdict)>> {
    let kernels = SERIES.map(|series| format!("Linux {series} of Debian"));
    if let Err(why) = means() {
        let why = format!("{why:#}");
        return Ok(kernels.map(|kernel| (kernel, Verdict::Skipped(why.clone()))).into());
    }
    let mut programs = vec![("ambassador", binary.to_owned())];
    for suite in SUITES {
        step(&format!("build the behaviours of `{suite}` for any kernel"));
        // With the product's own profile: half of what it takes is built already.
        let arguments = ["test", "--release", "--no-run", "--package", "ambassador-tests"];
        let built = release::linked_statically(&[&arguments[..], &["--test", suite]].concat())?;
        programs.push((suite, built));
    }
    let luggage = Luggage::pack(programs)?;

    let mut matrix = Matrix::default();
    let mut verdicts = Vec::new();
    for (series, kernel) in SERIES.into_iter().zip(kernels) {
        let verdict = match image::newest(series) {
            Err(why) => Verdict::Skipped(format!("{why:#}")),
            Ok(image) => {
                step(&format!("boot {kernel}"));
                let (told, ended) = machine::run(&image, &luggage.initramfs())?;
                matrix.enter(Visit::to_a_machine(&told, ended))
            }
        };
        verdicts.push((kernel, verdict));
    }
    step("try this machine's kernel");
    let here = matrix.enter(luggage.check_here().and_then(|told| Visit::here(&told)));
    verdicts.push(("this machine's kernel".into(), here));
    println!("{matrix}");
    Ok(verdicts)
}

/// An error if no machine can be started here.
fn means() -> Result<()> {
    ensure!(env::consts::ARCH == "x86_64", "the virtual machines are of the kind x86_64");
    setup::peers("other kernels", packages::FOR_KERNELS)
}

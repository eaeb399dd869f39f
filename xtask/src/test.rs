//! `cargo xtask test`: every test against the release binary, closing with one line of totals.
//!
//! What cannot run here (no root, no eBPF toolchain, a peer that is not installed) is skipped,
//! counted and explained; it is no failure.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use ambassador_tests::ambassador::BINARY;
use ambassador_tests::{podman, skip};
use anyhow::{Context, Result, ensure};

use crate::command::{self, cargo, shown, stdout_of, step};
use crate::kernels::{self, Verdict};
use crate::{image, packages, release, setup, workspace};

/// How long each fuzz target runs.
const FUZZ_SECONDS: u32 = 20;
/// So much of what a failed test said is said again at the end, where it is not lost among the passed ones.
const SAID_AGAIN: usize = 20;

/// Runs everything; an error if a test failed.
pub(crate) fn run() -> Result<()> {
    setup::kernel_half()?;
    if let Err(error) = setup::peers("the tests", packages::FOR_TESTS) {
        eprintln!("xtask: {error:#}");
    }
    let binary = release::build()?;

    step("tests");
    let skips = tempfile::NamedTempFile::new().context("create the list of skipped tests")?;
    let mut tests = cargo();
    tests.args(["test", "--workspace", "--no-fail-fast"]);
    tests.env(BINARY, &binary).env(skip::LIST, skips.path());
    let image = tempfile::NamedTempFile::new().context("create the image's archive")?;
    image::write(&binary, ARCH, image.path())?;
    tests.env(podman::IMAGE, image.path());
    let mut totals = Totals::default();
    totals.watch(&mut tests)?;
    let skips = std::fs::read_to_string(skips.path()).context("read the list of skipped tests")?;
    for (test, why) in skips.lines().filter_map(|line| line.split_once('\t')) {
        totals.skip(test, why);
    }

    fuzz(&mut totals)?;
    other_kernels(&mut totals, &binary)?;
    println!("{totals}");
    ensure!(totals.failed == 0, "tests failed");
    Ok(())
}

/// Runs each fuzz target for a short while, if the tool for it is there.
fn fuzz(totals: &mut Totals) -> Result<()> {
    let cargo_fuzz = |arguments: &[&str]| {
        let mut fuzz = cargo();
        fuzz.arg("fuzz").args(arguments).current_dir(workspace::root().join("tests"));
        // What it compiles in are unstable options of the compiler.
        fuzz.env("RUSTC_BOOTSTRAP", "1");
        fuzz
    };
    let installed = cargo_fuzz(&["--version"]).output().is_ok_and(|output| output.status.success());
    if !installed {
        totals.passed += 1;
        totals.skip("fuzz targets", "cargo-fuzz is not installed (`cargo install cargo-fuzz`)");
        return Ok(());
    }
    for target in stdout_of(&mut cargo_fuzz(&["list"]))?.lines() {
        step(&format!("fuzz {target} for {FUZZ_SECONDS} s"));
        let limit = format!("-max_total_time={FUZZ_SECONDS}");
        // What is fuzzed is safe Rust: a panic is what can go wrong, and no sanitizer is needed to see it.
        match command::run(&mut cargo_fuzz(&[
            "run",
            "--sanitizer",
            "none",
            target,
            "--",
            &limit,
            "-verbosity=0",
        ])) {
            Ok(()) => totals.passed += 1,
            Err(error) => totals.fail(&format!("fuzz target {target}"), &format!("{error:#}")),
        }
    }
    Ok(())
}

/// Takes the product to other kernels, and shows what works where.
fn other_kernels(totals: &mut Totals, binary: &Path) -> Result<()> {
    for (kernel, verdict) in kernels::visit(binary)? {
        match verdict {
            Verdict::Passed => totals.passed += 1,
            Verdict::Failed(why) => totals.fail(&kernel, &why),
            Verdict::Skipped(why) => {
                totals.passed += 1;
                totals.skip(&kernel, &why);
            }
        }
    }
    Ok(())
}

/// What became of the tests.
#[derive(Default)]
struct Totals {
    passed: usize,
    failed: usize,
    /// Failed tests, and the first lines of what each said.
    failures: BTreeMap<String, Vec<String>>,
    /// The failed test whose words the lines that come are.
    speaker: Option<String>,
    ignored: usize,
    /// Skipped tests, by the reason.
    skips: BTreeMap<String, Vec<String>>,
}

impl Totals {
    /// Runs the tests, showing their output as it comes and counting on the way.
    fn watch(&mut self, tests: &mut Command) -> Result<()> {
        let mut child = tests
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start `{}`", shown(tests)))?;
        let output = child.stdout.take().context("take the output of the tests")?;
        for line in BufReader::new(output).split(b'\n') {
            let mut line = line.context("read the output of the tests")?;
            self.read(&String::from_utf8_lossy(&line));
            line.push(b'\n');
            std::io::stdout().write_all(&line).context("show the output of the tests")?;
        }
        let status = child.wait().with_context(|| format!("wait for `{}`", shown(tests)))?;
        // A build that fails, or a test that takes its whole process down, reports no result.
        if !status.success() && self.failed == 0 {
            self.fail(&shown(tests), &status.to_string());
        }
        Ok(())
    }

    /// Takes in one line of a test binary's output.
    fn read(&mut self, line: &str) {
        if let Some(test) = line.strip_prefix("test ").and_then(|it| it.strip_suffix(" ... FAILED"))
        {
            self.failures.entry(test.to_owned()).or_default();
        }
        if let Some(test) =
            line.strip_prefix("---- ").and_then(|it| it.strip_suffix(" stdout ----"))
        {
            self.speaker = Some(test.to_owned());
        } else if ["failures:", "Stack backtrace:"].contains(&line) {
            self.speaker = None;
        } else if let Some(said) = self.speaker.as_ref().and_then(|it| self.failures.get_mut(it))
            && !line.is_empty()
            && said.len() < SAID_AGAIN
        {
            said.push(line.to_owned());
        }
        let Some(counts) = line.strip_prefix("test result: ") else { return };
        for count in counts.split([';', '.']) {
            match count.trim().split_once(' ') {
                Some((number, "passed")) => self.passed += number.parse().unwrap_or(0),
                Some((number, "failed")) => self.failed += number.parse().unwrap_or(0),
                Some((number, "ignored")) => self.ignored += number.parse().unwrap_or(0),
                _ => {}
            }
        }
    }

    /// Takes in what failed outside of the test binaries.
    fn fail(&mut self, what: &str, why: &str) {
        eprintln!("xtask: {what}: {why}");
        self.failed += 1;
        self.failures.insert(what.to_owned(), vec![why.to_owned()]);
    }

    /// Takes a test that returned early from the passed ones; one that went without a part stays.
    fn skip(&mut self, test: &str, why: &str) {
        if !test.ends_with(skip::PART) {
            self.passed = self.passed.saturating_sub(1);
        }
        self.skips.entry(why.to_owned()).or_default().push(test.to_owned());
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (why, tests) in &self.skips {
            writeln!(f, "skipped, because {why}:")?;
            tests.iter().try_for_each(|test| writeln!(f, "  {test}"))?;
        }
        for (test, said) in &self.failures {
            writeln!(f, "failed: {test}")?;
            said.iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        }
        let skipped = self.ignored + self.skips.values().map(Vec::len).sum::<usize>();
        write!(f, "{} passed, {} failed, {skipped} skipped", self.passed, self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals_of(lines: &[&str]) -> Totals {
        let mut totals = Totals::default();
        lines.iter().for_each(|line| totals.read(line));
        totals
    }

    #[test]
    fn result_lines_add_up() {
        let totals = totals_of(&[
            "running 3 tests",
            "test a::b ... FAILED",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out",
        ]);
        assert_eq!(totals.to_string(), "failed: a::b\n4 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn failed_test_says_why_again() {
        let mut totals = totals_of(&[
            "test a ... FAILED",
            "test b ... FAILED",
            "failures:",
            "",
            "---- a stdout ----",
            "Error: refused",
            "",
            "Stack backtrace:",
            "   0: anyhow",
            "---- b stdout ----",
            "Error: late",
            "failures:",
            "    a",
        ]);
        totals.read("---- b stdout ----");
        (0..2 * SAID_AGAIN).for_each(|_| totals.read("more"));
        let more = "  more\n".repeat(SAID_AGAIN - 1);
        assert_eq!(
            totals.to_string(),
            format!(
                "failed: a\n  Error: refused\nfailed: b\n  Error: late\n{more}0 passed, 0 failed, 0 skipped"
            )
        );
    }

    #[test]
    fn a_skipped_test_is_not_a_passed_one() {
        let mut totals = Totals { passed: 5, ..Totals::default() };
        totals.skip("direct::counts", "it needs root");
        totals.skip("redis::answers", "it needs root");
        totals.skip("web::pages (a part)", "it needs root");
        assert_eq!(
            totals.to_string(),
            "skipped, because it needs root:\n  direct::counts\n  redis::answers\n  web::pages (a part)\n\
             3 passed, 0 failed, 3 skipped"
        );
    }
}

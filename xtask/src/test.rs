//! `cargo xtask test`: every test against the release binary, closing with one line of totals.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::command::{cargo, shown, step};
use crate::release;

/// Runs the tests; an error if one failed.
pub(crate) fn run() -> Result<()> {
    let binary = release::build()?;
    let skips = tempfile::NamedTempFile::new().context("create the list of skipped tests")?;

    step("tests");
    let mut tests = cargo();
    tests.args(["test", "--workspace", "--no-fail-fast"]);
    tests.env("AMBASSADOR_BIN", binary).env("AMBASSADOR_SKIPS", skips.path());
    let mut totals = watch(&mut tests)?;

    let skipped =
        std::fs::read_to_string(skips.path()).context("read the list of skipped tests")?;
    totals.skip(&skipped.lines().map(str::to_owned).collect::<Vec<_>>());
    for skip in &totals.skips {
        println!("skipped: {}", skip.replace('\t', ": "));
    }
    println!(
        "{} passed, {} failed, {} skipped",
        totals.passed,
        totals.failed,
        totals.skips.len() + totals.ignored
    );
    ensure!(totals.failed == 0, "{} tests failed", totals.failed);
    Ok(())
}

/// What the test binaries reported.
#[derive(Default)]
struct Totals {
    passed: usize,
    failed: usize,
    ignored: usize,
    skips: Vec<String>,
}

impl Totals {
    /// Adds one `test result:` line of the test runner; other lines are none of our business.
    fn read(&mut self, line: &str) {
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

    /// Moves tests that returned early from the passed ones to the skipped ones.
    fn skip(&mut self, skips: &[String]) {
        self.passed = self.passed.saturating_sub(skips.len());
        self.skips.extend_from_slice(skips);
    }
}

/// Runs the tests, showing their output as it comes and counting on the way.
fn watch(tests: &mut Command) -> Result<Totals> {
    let mut child = tests
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start `{}`", shown(tests)))?;
    let stdout = child.stdout.take().context("take the output of the tests")?;
    let mut totals = Totals::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("read the output of the tests")?;
        std::io::stdout()
            .write_all(&[&line, &b"\n"[..]].concat())
            .context("show the output of the tests")?;
        totals.read(&String::from_utf8_lossy(&line));
    }
    let status = child.wait().with_context(|| format!("wait for `{}`", shown(tests)))?;
    // A build that fails, or a test that takes its whole process down, reports no result.
    if !status.success() && totals.failed == 0 {
        totals.failed = 1;
    }
    Ok(totals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_add_up() {
        let mut totals = Totals::default();
        totals.read("running 3 tests");
        totals.read("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s");
        totals.read("test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s");
        assert_eq!((totals.passed, totals.failed, totals.ignored), (4, 2, 1));
    }

    #[test]
    fn a_skipped_test_is_not_a_passed_one() {
        let mut totals = Totals { passed: 5, ..Totals::default() };
        totals.skip(&["tracker::counts\tnot root".into(), "redis::answers\tno redis".into()]);
        assert_eq!((totals.passed, totals.skips.len()), (3, 2));
    }
}

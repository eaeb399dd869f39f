//! The length of the eBPF programs, held against `tests/cost.json`, so that a change which makes a hot path
//! longer is seen. What the user half costs is in the same file, and a test.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::build_ebpf::Lengths;
use crate::workspace;

const BASELINE: &str = "tests/cost.json";
/// Compilers differ by a few instructions.
const TOLERANCE: f64 = 0.03;

/// An error if a program has become longer than it was.
pub(crate) fn compare(lengths: &Lengths) -> Result<()> {
    let baseline =
        fs::read(workspace::root().join(BASELINE)).with_context(|| format!("read {BASELINE}"))?;
    let baseline: Value = serde_json::from_slice(&baseline).context("parse the baseline")?;
    let longer = longer(lengths, &baseline["kernel half"]);
    ensure!(
        longer.is_empty(),
        "{}; if that is meant, say so in {BASELINE}, in the same commit",
        longer.join(", ")
    );
    Ok(())
}

/// Those that have become longer, or that are new.
fn longer(lengths: &Lengths, baseline: &Value) -> Vec<String> {
    let complaint = |(name, now): &(String, u64)| match baseline[name].as_f64() {
        None => Some(format!("{name} is new, with {now} instructions")),
        Some(before) if *now as f64 > before * (1.0 + TOLERANCE) => {
            Some(format!("{name} has {now} instructions, it had {before}"))
        }
        Some(_) => None,
    };
    lengths.iter().filter_map(complaint).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_is_longer_or_new_is_told() {
        let baseline = json!({ "same": 100, "shorter": 100, "little": 100, "longer": 100 });
        let lengths =
            [("same", 100), ("shorter", 50), ("little", 102), ("longer", 104), ("new", 1)];
        let lengths = lengths.map(|(name, length)| (name.to_owned(), length)).to_vec();
        let told = ["longer has 104 instructions, it had 100", "new is new, with 1 instructions"];
        assert_eq!(longer(&lengths, &baseline), told);
    }
}

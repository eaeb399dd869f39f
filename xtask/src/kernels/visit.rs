//! What the checks said on one kernel, and what is wrong with it.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::SUITES;

/// One kernel's column of the table.
pub(super) struct Visit {
    pub(super) kernel: String,
    pub(super) findings: Vec<Finding>,
    /// What must not be.
    pub(super) wrong: Vec<String>,
}

/// One cell of it.
pub(super) struct Finding {
    pub(super) what: String,
    pub(super) cell: String,
    pub(super) remark: Option<String>,
}

impl Visit {
    /// Reads what was said on this machine, where anybody may run anything, and not everything.
    pub(super) fn here(told: &str) -> Result<Self> {
        let mut visit = Self::read(&sections(told))?;
        visit.kernel += " (here)";
        Ok(visit)
    }

    /// Reads what was said in a virtual machine, where nothing stands in the way, and how it ended.
    pub(super) fn to_a_machine(told: &str, ended: Result<()>) -> Result<Self> {
        let sections = sections(told);
        let mut visit = match Self::read(&sections) {
            Ok(visit) => visit,
            // Why it ended early says more than what is missing.
            Err(missing) => return Err(ended.err().unwrap_or(missing)),
        };
        visit.wrong.extend(ended.err().map(|end| format!("{end:#}")));
        match sections.get("warnings") {
            None => visit.wrong.push("it did not come to its end".into()),
            Some((_, warnings)) if warnings.is_empty() => {}
            Some((_, warnings)) => visit.wrong.push(format!("the kernel warned:\n{warnings}")),
        }
        let doctor = doctor(&sections, "doctor")?;
        if doctor.ebpf.embedded {
            visit.wrong.extend(doctor.fails());
        }
        Ok(visit)
    }

    fn read(sections: &Sections) -> Result<Self> {
        let (_, kernel) = sections.get("kernel").context("it did not even say its name")?;
        let mut visit = Self { kernel: release(kernel), findings: Vec::new(), wrong: Vec::new() };
        visit.examined("", doctor(sections, "doctor")?);
        if sections.contains_key("unprivileged") {
            visit.examined(", unprivileged", doctor(sections, "unprivileged")?);
        }
        for suite in SUITES {
            let Some((code, output)) = sections.get(suite) else {
                visit.wrong.push(format!("`{suite}` did not end"));
                continue;
            };
            let skips = sections.get("skips").map_or("", |(_, skips)| skips);
            visit.behaved(suite, output, skips);
            if *code != 0 {
                visit.wrong.push(format!("`{suite}` ended with {code}:\n{output}"));
            }
        }
        Ok(visit)
    }

    /// Takes in what the doctor said.
    fn examined(&mut self, who: &str, doctor: Doctor) {
        let loads = if doctor.ebpf.obstacle.is_none() { "yes" } else { "no" };
        self.find(format!("eBPF object loads{who}"), loads, doctor.ebpf.obstacle);
        for Tier { tier, works, reason, note } in doctor.tiers {
            self.find(format!("`{tier}`{who}"), if works { "works" } else { "no" }, reason);
            if tier == "sockmap" && works {
                let cell = if note.is_none() { "yes" } else { "no" };
                self.find(format!("`auto` takes `{tier}` unasked{who}"), cell, note);
            }
        }
        for Check { tier, check, passed, detail } in doctor.checks {
            let cell = match passed {
                Some(true) => "passed",
                Some(false) => "failed",
                None => "skipped",
            };
            self.find(format!("`{tier}`{who}: {check}"), cell, detail);
        }
        for Fact { tier, fact, holds, detail } in doctor.facts {
            let cell = match holds {
                Some(true) => "yes",
                Some(false) => "no",
                None => "not known",
            };
            self.find(format!("`{tier}`{who}: {fact}"), cell, detail);
        }
    }

    /// Takes in what the tests of a suite said, and which of them could not run.
    fn behaved(&mut self, suite: &str, output: &str, skips: &str) {
        let mut tests: Vec<_> = output
            .lines()
            .filter_map(|line| line.strip_prefix("test ")?.split_once(" ... "))
            .collect();
        tests.sort_unstable();
        for (test, outcome) in tests {
            let skip = skips.lines().filter_map(|line| line.split_once('\t')).find_map(
                |(skipped, why)| (skipped.split_once("::")?.1 == test).then(|| why.to_owned()),
            );
            let cell = match (outcome, &skip) {
                (_, Some(_)) => "skipped",
                ("ok", None) => "passed",
                (other, None) => other,
            };
            self.find(format!("{suite} `{test}`"), cell, skip);
        }
    }

    fn find(&mut self, what: String, cell: &str, remark: Option<String>) {
        self.findings.push(Finding { what, cell: cell.into(), remark });
    }
}

/// What `ambassador doctor --json` says, as far as it is wanted here.
#[derive(Deserialize)]
struct Doctor {
    ebpf: Ebpf,
    tiers: Vec<Tier>,
    #[serde(default)]
    checks: Vec<Check>,
    #[serde(default)]
    facts: Vec<Fact>,
}

#[derive(Deserialize)]
struct Ebpf {
    embedded: bool,
    obstacle: Option<String>,
}

#[derive(Deserialize)]
struct Tier {
    tier: String,
    works: bool,
    reason: Option<String>,
    /// Why `auto` does not take it all the same.
    note: Option<String>,
}

#[derive(Deserialize)]
struct Check {
    tier: String,
    check: String,
    /// Nothing if it could not be tried there.
    passed: Option<bool>,
    detail: Option<String>,
}

/// What apps can notice.
#[derive(Deserialize)]
struct Fact {
    tier: String,
    fact: String,
    holds: Option<bool>,
    detail: Option<String>,
}

impl Doctor {
    /// What a tier of the kernel lacks, where privileges do not.
    fn fails(self) -> Vec<String> {
        if let Some(obstacle) = self.ebpf.obstacle {
            return vec![format!("the eBPF object does not load: {obstacle}")];
        }
        let works = |tier: &str| self.tiers.iter().any(|it| it.tier == tier && it.works);
        let reason = |tier: &str| {
            let told = self.tiers.iter().find(|it| it.tier == tier);
            told.and_then(|it| it.reason.as_deref()).unwrap_or("not told of")
        };
        let missing = ["direct", "sockmap"].into_iter().filter(|tier| !works(tier));
        missing.map(|tier| format!("`{tier}` does not work: {}", reason(tier))).collect()
    }
}

fn doctor(sections: &Sections, name: &str) -> Result<Doctor> {
    let (code, text) = sections.get(name).with_context(|| format!("find what {name} said"))?;
    ensure!(*code == 0, "{name} ended with {code}: {text}");
    serde_json::from_str(text).with_context(|| format!("read what {name} said: {text}"))
}

/// The exit code and the output of every check.
type Sections<'a> = HashMap<&'a str, (i32, String)>;

/// Cuts what was said at the marks that `checks.sh` sets. A check that did not end is none.
fn sections(told: &str) -> Sections<'_> {
    let mut sections = Sections::new();
    let mut open = None;
    for line in told.lines() {
        if let Some(name) = line.strip_prefix("@begin ") {
            open = Some((name, String::new()));
        } else if let Some(code) = line.strip_prefix("@end ") {
            if let (Some((name, text)), Ok(code)) = (open.take(), code.parse()) {
                sections.insert(name, (code, text.trim().to_owned()));
            }
        } else if let Some((_, text)) = &mut open {
            text.push_str(line);
            text.push('\n');
        }
    }
    sections
}

/// The kernel's release as its makers number it, out of what `uname -rv` says. Debian's own names
/// leave the last number to the text behind.
fn release(uname: &str) -> String {
    let mut words = uname.split_whitespace();
    let name = words.next().unwrap_or_default();
    let number = words.skip_while(|&word| word != "Debian").nth(1).unwrap_or(name);
    number.split(['-', '+']).next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCTOR: &str = r#"{"kernel":"x","ebpf":{"embedded":true,"loads":true,"obstacle":null},
        "tiers":[{"tier":"direct","works":false,"reason":"too old"},
            {"tier":"sockmap","works":true,"reason":null,"note":"noticed"}],
        "checks":[{"tier":"direct","check":"rewrites","passed":false,"detail":"EPERM"},
            {"tier":"direct","check":"rewrites IPv6","passed":null,"detail":"no IPv6"}],
        "facts":[{"tier":"sockmap","fact":"counts","holds":true,"detail":null}]}"#;

    /// What it says where the verifier refuses none of the programs.
    fn working() -> String {
        DOCTOR.replace(r#""works":false,"reason":"too old""#, r#""works":true,"reason":null"#)
    }

    fn told(torture: i32, warning: &str) -> String {
        told_by(&working(), torture, warning)
    }

    fn told_by(doctor: &str, torture: i32, warning: &str) -> String {
        format!(
            "@begin kernel\n6.1.0-56-cloud-amd64 #1 SMP Debian 6.1.192-2 (2026-11-16)\n\n@end 0\n\
             @begin doctor\n{doctor}\n@end 0\n\
             @begin torture\ntest tcp::b ... FAILED\ntest tcp::a ... ok\ntest tcp::c ... ok\n@end {torture}\n\
             @begin app\ntest wait::auto::any::d ... ok\n@end 0\n\
             @begin skips\nt::tcp::c\tneeds root\n\n@end 0\n@begin warnings\n{warning}@end 0\n"
        )
    }

    #[test]
    fn every_tier_check_and_fact_is_a_finding_with_its_reason() -> Result<()> {
        let visit = Visit::here(&told_by(DOCTOR, 0, ""))?;
        assert_eq!(visit.kernel, "6.1.192 (here)");
        let found: Vec<_> = visit
            .findings
            .iter()
            .map(|it| (it.what.as_str(), it.cell.as_str(), it.remark.as_deref()))
            .collect();
        let expected = [
            ("eBPF object loads", "yes", None),
            ("`direct`", "no", Some("too old")),
            ("`sockmap`", "works", None),
            ("`auto` takes `sockmap` unasked", "no", Some("noticed")),
            ("`direct`: rewrites", "failed", Some("EPERM")),
            ("`direct`: rewrites IPv6", "skipped", Some("no IPv6")),
            ("`sockmap`: counts", "yes", None),
            ("torture `tcp::a`", "passed", None),
            ("torture `tcp::b`", "FAILED", None),
            ("torture `tcp::c`", "skipped", Some("needs root")),
            ("app `wait::auto::any::d`", "passed", None),
        ];
        assert_eq!(found, expected);
        assert!(visit.wrong.is_empty());
        Ok(())
    }

    #[test]
    fn a_tier_of_the_kernel_that_does_not_work_is_wrong_in_a_machine_and_not_here() -> Result<()> {
        let lacking = told_by(DOCTOR, 0, "");
        let visit = Visit::to_a_machine(&lacking, Ok(()))?;
        assert_eq!(visit.wrong, ["`direct` does not work: too old"]);
        assert!(Visit::here(&lacking)?.wrong.is_empty());
        let visit = Visit::to_a_machine(&told(0, ""), Ok(()))?;
        assert!(visit.wrong.is_empty(), "{:?}", visit.wrong);
        Ok(())
    }

    #[test]
    fn a_failed_torture_and_a_warning_of_the_kernel_are_wrong() -> Result<()> {
        let visit = Visit::to_a_machine(&told(101, "WARNING: CPU: 0\n"), Ok(()))?;
        assert_eq!(visit.wrong.len(), 2, "{:?}", visit.wrong);
        Ok(())
    }

    #[test]
    fn what_a_machine_said_before_it_was_cut_off_is_read_but_not_right() -> Result<()> {
        let told = told(0, "");
        let cut = told.find("@begin torture").context("find the torture")?;
        let visit = Visit::to_a_machine(&told[..cut], Err(anyhow::anyhow!("out of time")))?;
        assert_eq!(visit.findings.last().map(|it| it.cell.as_str()), Some("yes"));
        assert!(visit.wrong.contains(&"out of time".to_owned()), "{:?}", visit.wrong);
        Ok(())
    }

    #[test]
    fn a_release_is_numbered_as_its_makers_do() {
        assert_eq!(
            release("6.12.117+deb12-cloud-amd64 #1 SMP Debian 6.12.117-1~deb12u1"),
            "6.12.117"
        );
        assert_eq!(release("6.18.44-other #1 SMP"), "6.18.44");
    }
}

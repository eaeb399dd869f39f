//! Says of every tier whether it works here, why not, and what to change.

use std::fmt;
use std::process::ExitCode;

use serde::Serialize;

use crate::config::{Cgroup, Tier};
use crate::datapath;
use crate::datapath::kernel;
use crate::datapath::known_bad::{self, Known};
use crate::datapath::obstacle::Obstacle;
use crate::datapath::selftest::{Check, Fact, Found, Outcome};
use crate::privileges;
use crate::tier::{Ladder, REQUIRED_TIER_MISSING, SOCKMAP_IS_NOTICED, TIERS};

/// Everything the doctor found.
#[derive(Debug, Serialize)]
pub struct Report {
    version: &'static str,
    kernel: String,
    user: u32,
    capabilities: String,
    ebpf: Ebpf,
    tiers: Vec<Finding>,
    /// Of this kernel, those that concern `sockmap`.
    known_bugs: Vec<Known>,
    /// What was tried of the kernel tiers.
    checks: Vec<Tried>,
    /// What apps can notice of them.
    facts: Vec<Noticed>,
}

/// One check of the self-test.
#[derive(Debug, Serialize)]
struct Tried {
    tier: String,
    check: &'static str,
    /// Nothing if it cannot be tried here.
    passed: Option<bool>,
    /// Why it failed, or cannot be tried.
    detail: Option<String>,
}

/// Something that ordinary sockets do, and those that a tier serves may not.
#[derive(Debug, Serialize)]
struct Noticed {
    tier: String,
    fact: &'static str,
    /// Nothing if it is not known.
    holds: Option<bool>,
    /// Why it is not known.
    detail: Option<String>,
}

/// What of the kernel tiers works by what was found, or why nothing could be.
pub fn kernel_tiers(found: &Result<Found, Obstacle>) -> Ladder {
    match found {
        Ok(found) => Ladder {
            no_direct: found.no_direct(),
            no_sockmap: found.no_sockmap(),
            no_sockmap_unasked: (!found.counts_waiting_bytes)
                .then(|| SOCKMAP_IS_NOTICED.to_owned()),
            ..Ladder::default()
        },
        Err(obstacle) => Ladder {
            no_direct: Some(obstacle.to_string()),
            no_sockmap: Some(obstacle.of_sockmap()),
            ..Ladder::default()
        },
    }
}

/// The kernel half.
#[derive(Debug, Serialize)]
struct Ebpf {
    embedded: bool,
    sha256: Option<&'static str>,
    /// Whether this process could load it.
    loads: bool,
    obstacle: Option<String>,
}

/// One tier.
#[derive(Debug, Serialize)]
struct Finding {
    tier: String,
    works: bool,
    /// Why it does not.
    reason: Option<String>,
    /// Why `auto` does not take it all the same.
    note: Option<String>,
}

impl Report {
    /// Looks, by moving real bytes and loading the real programs; leaves nothing behind.
    pub fn make(cgroup: &Cgroup) -> Self {
        let object = datapath::object();
        let found = kernel::examine(cgroup);
        let ladder = Ladder::probe(kernel_tiers(&found));
        let obstacle = found.as_ref().err().map(ToString::to_string);
        let tried =
            |it: Found| (it.direct.unwrap_or_default(), it.sockmap.unwrap_or_default(), it.facts);
        let (direct, sockmap, facts) = found.map(tried).unwrap_or_default();
        let of = |tier: Tier| {
            move |Check { name, outcome }| {
                let (passed, detail) = match outcome {
                    Outcome::Passed => (Some(true), None),
                    Outcome::Skipped(why) => (None, Some(why)),
                    Outcome::Failed(why) => (Some(false), Some(why)),
                };
                Tried { tier: tier.to_string(), check: name, passed, detail }
            }
        };
        let fact = |Fact { name, holds }| {
            let tier = Tier::Sockmap.to_string();
            Noticed { tier, fact: name, holds: holds.as_ref().ok().copied(), detail: holds.err() }
        };
        let direct = direct.into_iter().map(of(Tier::Direct));
        let checks = direct.chain(sockmap.into_iter().map(of(Tier::Sockmap)));
        Self {
            version: env!("CARGO_PKG_VERSION"),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .map_or_else(|error| error.to_string(), |release| release.trim().to_owned()),
            user: privileges::effective_user(),
            capabilities: privileges::held(),
            ebpf: Ebpf {
                embedded: object.is_some(),
                sha256: object.map(|object| object.sha256),
                loads: obstacle.is_none(),
                obstacle,
            },
            tiers: TIERS
                .into_iter()
                .map(|tier| {
                    let reason = ladder.obstacle(tier).map(str::to_owned);
                    let note = (tier == Tier::Sockmap && reason.is_none())
                        .then(|| ladder.no_sockmap_unasked.clone())
                        .flatten();
                    Finding { tier: tier.to_string(), works: reason.is_none(), reason, note }
                })
                .collect(),
            known_bugs: known_bad::here(),
            checks: checks.collect(),
            facts: facts.into_iter().map(fact).collect(),
        }
    }

    /// What `--require` says of it.
    pub fn verdict(&self, required: Option<Tier>) -> ExitCode {
        let works = |tier: Tier| {
            let name = tier.to_string();
            self.tiers.iter().any(|finding| finding.tier == name && finding.works)
        };
        match required {
            Some(tier) if !works(tier) => ExitCode::from(REQUIRED_TIER_MISSING),
            _ => ExitCode::SUCCESS,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "ambassador {}, Linux {}", self.version, self.kernel)?;
        writeln!(f, "user {}, capabilities {}", self.user, self.capabilities)?;
        match (&self.ebpf.sha256, &self.ebpf.obstacle) {
            (Some(hash), None) => writeln!(f, "eBPF object {}: loads", &hash[..12])?,
            (Some(hash), Some(why)) => writeln!(f, "eBPF object {}: {why}", &hash[..12])?,
            (None, why) => writeln!(f, "no kernel tiers: {}", why.as_deref().unwrap_or_default())?,
        }
        writeln!(f)?;
        for Finding { tier, reason, note, .. } in &self.tiers {
            match reason {
                None => writeln!(f, "{tier:<8} works")?,
                Some(reason) => writeln!(f, "{tier:<8} no: {reason}")?,
            }
            for tried in self.checks.iter().filter(|it| it.tier == *tier) {
                let Tried { check, detail, .. } = tried;
                let why = detail.as_deref().unwrap_or_default();
                match tried.passed {
                    Some(true) => writeln!(f, "  ok      {check}")?,
                    Some(false) => writeln!(f, "  failed  {check}: {why}")?,
                    None => writeln!(f, "  skipped {check}: {why}")?,
                }
            }
            for noticed in self.facts.iter().filter(|it| it.tier == *tier) {
                let Noticed { fact, detail, .. } = noticed;
                let why = detail.as_deref().unwrap_or_default();
                match noticed.holds {
                    Some(true) => writeln!(f, "  fact    {fact}: yes")?,
                    Some(false) => writeln!(f, "  fact    {fact}: no")?,
                    None => writeln!(f, "  fact    {fact}: not known: {why}")?,
                }
            }
            if let Some(note) = note {
                writeln!(f, "  note    {note}")?;
            }
            if *tier == Tier::Sockmap.to_string() {
                for bug in self.known_bugs.iter().filter(|bug| !bug.closes) {
                    writeln!(f, "  known   {bug}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_required_tier_that_does_not_work_is_a_77() {
        let report = Report::make(&Cgroup::At("/nowhere".into()));
        assert_eq!(report.verdict(Some(Tier::Copy)), ExitCode::SUCCESS);
        assert_eq!(report.verdict(Some(Tier::Direct)), ExitCode::from(REQUIRED_TIER_MISSING));
        assert_eq!(report.verdict(None), ExitCode::SUCCESS);
    }
}

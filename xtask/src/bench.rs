//! `cargo xtask bench`: the ambassador beside no proxy and other proxies, in one interleaved run.

mod catalogue;
mod chart;
mod cpu;
mod failing;
mod gallery;
mod limits;
pub(crate) mod load;
mod machine;
mod memory;
mod readme;
mod report;
mod results;
pub(crate) mod scene;
pub(crate) mod subject;
mod targets;

use std::env;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use ::ambassador::bench::cpu::{Cpus, Strangers};
use ::ambassador::bench::progress::Progress;
use ambassador_tests::ambassador;
use ambassador_tests::pod::is_root;
use ambassador_tests::server::{find, missing};
use anyhow::{Result, anyhow, ensure};
use clap::{Args, ValueEnum};

use crate::{packages, release, setup};
use catalogue::{Kind, LOADS, Load, Service};
use load::Scale;
use machine::Machine;
use report::Report;
use results::{End, Results, Sample};
use scene::Scene;
use subject::peer::Peer;
use subject::{KERNEL_TIERS, Subject};

/// More than this many CPUs taken by others, and the figures are not to be trusted.
const DISTURBED: f64 = 0.2;

/// What a quick run may take, the start and the end of it left out.
const QUICK: Duration = Duration::from_secs(110);

/// What to measure, and how long.
#[derive(Args)]
pub(crate) struct Options {
    /// Two minutes at most: short rounds, three if they fit, of some of the loads
    #[arg(long)]
    quick: bool,
    /// How often each load goes through each subject [default: 5, with --quick 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// Only these loads
    #[arg(long, value_enum, value_name = "LOAD,...", value_delimiter = ',')]
    only: Vec<Load>,
    /// Beside these proxies only
    #[arg(long, value_enum, value_name = "PEER,...", value_delimiter = ',')]
    peers: Vec<Peer>,
    /// Where results.json, report.md and the charts go
    #[arg(long, value_name = "DIR", default_value = "bench-results")]
    out: PathBuf,
    /// Measure nothing: put what an earlier run left in --out into README, with its charts
    #[arg(long, conflicts_with_all = ["quick", "rounds", "only", "peers"])]
    report: bool,
}

/// Measures the binary that `AMBASSADOR_BIN` names, or else a fresh one; prints the report and
/// writes it. An error if anything failed.
pub(crate) fn run(options: &Options) -> Result<()> {
    if options.report {
        return readme::rewrite(&Report::read(&options.out)?);
    }
    if let Err(error) = setup::peers("the benchmark", packages::FOR_BENCH) {
        eprintln!("xtask: {error:#}");
    }
    let binary = match env::var_os(ambassador::BINARY) {
        Some(binary) => binary.into(),
        None => {
            setup::kernel_half()?;
            release::build()?
        }
    };
    let report = measure(options, &binary)?;
    print!("{}", report.markdown());
    report.write(&options.out)?;
    eprintln!("written: {0}/results.json, {0}/report.md, {0}/*.svg", options.out.display());
    let failures = report.results.failures().len();
    ensure!(failures == 0, "{failures} measurements failed");
    Ok(())
}

fn measure(options: &Options, binary: &Path) -> Result<Report> {
    let mut notes = Vec::new();
    let loads = options.loads(limits::allow_descriptors()?, &mut notes);
    ensure!(!loads.is_empty(), "nothing can be measured: {}", notes.join("; "));
    let (subjects, programs) = options.subjects(binary, &mut notes);
    let (rounds, scale) = options.extent();
    notes.push(format!(
        "rounds: {rounds}; each load goes through one subject after the other; every measurement starts its \
         own proxy and server, but for PostgreSQL, which serves all of them; clients and proxy share one CPU, \
         the server has another"
    ));
    notes.push(
        "the ambassador logs warnings, the others nothing; HAProxy runs with `splice-auto`, and once more \
         with splicing forced"
            .into(),
    );

    let cpus = Cpus::choose()?;
    let strangers = Strangers::watch(cpus)?;
    let scene = Scene::set(cpus, &loads)?;
    notes.extend(scene.notes.iter().cloned());
    let pairs: Vec<(Load, &Subject)> = loads
        .iter()
        .flat_map(|&load| subjects.iter().map(move |subject| (load, subject)))
        .filter(|(load, subject)| subject.carries(*load))
        .collect();
    let mut results = Results::default();
    let mut progress = Progress::new(usize::from(rounds) * pairs.len());
    let start = Instant::now();
    for round in 1..=rounds {
        let done = round - 1;
        // The next one will take as long as those before did on average.
        if options.is_hasty()
            && done > 0
            && start.elapsed() * u32::from(round) / u32::from(done) > QUICK
        {
            notes.push(format!("there was time for {done} rounds only"));
            break;
        }
        for &(load, subject) in &pairs {
            let name = subject.name();
            progress.step(&format!("round {round}: {} through {name}", load.name));
            let end = match scene.measure(subject, load, scale) {
                Ok(outcome) => End::Measured(outcome),
                Err(error) => End::Failed(format!("{error:#}")),
            };
            results.0.push(Sample { round, load, subject: name, end });
        }
    }
    progress.end();
    // What its servers have taken is known to be ours once they have ended.
    drop(scene);
    let share = strangers.share()?;
    let disturbed = share > DISTURBED;
    if disturbed {
        notes.push(format!(
            "DISTURBED: other programs kept {share:.1} of the CPUs busy meanwhile; repeat this on a \
             quiet machine"
        ));
    }
    let mut date = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    date.truncate("2026-01-31".len());
    Ok(Report {
        date,
        quick: options.quick,
        machine: Machine::look(&programs)?,
        notes,
        disturbed,
        loads,
        subjects: subjects.iter().map(Subject::name).collect(),
        results,
    })
}

/// Programs, each with the argument that makes it say its version.
type Programs = Vec<(PathBuf, &'static str)>;

impl Options {
    /// Whether the rounds are as many as there is time for.
    fn is_hasty(&self) -> bool {
        self.quick && self.rounds.is_none()
    }

    /// How many rounds, and how much in each.
    fn extent(&self) -> (u16, Scale) {
        let (rounds, scale) = if self.quick {
            (3, Scale { time: Duration::from_millis(250), bytes: 512 << 20, requests: 15_000 })
        } else {
            (5, Scale { time: Duration::from_secs(1), bytes: 3 << 30, requests: 60_000 })
        };
        (self.rounds.unwrap_or(rounds), scale)
    }

    /// What to measure, as far as the servers are here and so many descriptors allow.
    fn loads(&self, descriptors: u64, notes: &mut Vec<String>) -> Vec<Load> {
        let mut loads = if self.only.is_empty() { LOADS.to_vec() } else { self.only.clone() };
        if self.quick && self.only.is_empty() {
            let (quick, left): (Vec<Load>, _) = loads.iter().partition(|load| load.quick);
            loads = quick;
            notes.push(format!("left to the full run: {}", names(&left)));
        }
        let servers = [
            (Service::Redis, ["redis-server", "redis-benchmark"]),
            (Service::Postgres, ["postgres", "pgbench"]),
        ];
        for (service, programs) in servers {
            if let Some(program) = missing(&programs) {
                let why = format!("{program} is not installed");
                loads = without(loads, |load| load.service() == service, &why, notes);
            }
        }
        if !is_root() || missing(&["nft"]).is_some() {
            let filtered = |load: &Load| matches!(load.kind, Kind::Failover { failure, .. } if failure.is_on_the_way());
            loads = without(loads, filtered, "the packet filter needs root, and nft", notes);
        }
        let why = format!("only {descriptors} files may be open");
        without(loads, |load| load.descriptors() > descriptors, &why, notes)
    }

    /// What to measure it through, as far as it is here.
    fn subjects(&self, binary: &Path, notes: &mut Vec<String>) -> (Vec<Subject>, Programs) {
        let ambassador_at =
            |tier: &str| Subject::Ambassador { binary: binary.to_owned(), tier: tier.to_owned() };
        let mut subjects = vec![Subject::NoProxy];
        let said = ambassador::doctor(binary);
        for tier in KERNEL_TIERS {
            let asked = said.as_ref().map_err(|error| anyhow!("{error:#}"));
            match asked.and_then(|said| ambassador::obstacle_in(said, tier)) {
                Ok(None) => subjects.push(ambassador_at(tier)),
                Ok(Some(why)) => notes.push(format!("skipped: ambassador {why}")),
                Err(error) => notes.push(format!("skipped: ambassador {tier}: {error:#}")),
            }
        }
        subjects.extend([ambassador_at("splice"), ambassador_at("copy")]);
        let mut programs = vec![(binary.to_owned(), "version")];
        let peers = if self.peers.is_empty() { Peer::value_variants() } else { &self.peers };
        for &peer in peers {
            match find(peer.program()) {
                None => notes.push(format!("skipped: {}, which is not installed", peer.title())),
                Some(program) => {
                    let version = (program.clone(), peer.version_flag());
                    if !programs.contains(&version) {
                        programs.push(version);
                    }
                    subjects.push(Subject::Peer { peer, program });
                }
            }
        }
        programs.extend(find("redis-server").map(|redis| (redis, "--version")));
        programs.extend(find("postgres").map(|postgres| (postgres, "--version")));
        (subjects, programs)
    }
}

/// All but those for which this holds, which are named with the reason.
fn without(
    loads: Vec<Load>,
    holds: impl Fn(&Load) -> bool,
    why: &str,
    notes: &mut Vec<String>,
) -> Vec<Load> {
    let (skipped, rest): (Vec<Load>, _) = loads.iter().partition(|load| holds(load));
    if !skipped.is_empty() {
        notes.push(format!("skipped: {}, for {why}", names(&skipped)));
    }
    rest
}

fn names(loads: &[Load]) -> String {
    loads.iter().map(|load| load.name).collect::<Vec<_>>().join(", ")
}

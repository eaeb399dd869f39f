//! `cargo xtask bench`: the ambassador beside no proxy, HAProxy and nginx, in one interleaved run.

mod cpu;
mod limits;
pub(crate) mod load;
mod machine;
mod pattern;
mod progress;
mod report;
mod results;
pub(crate) mod scene;
pub(crate) mod subject;
pub(crate) mod table;
pub(crate) mod upstream;

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ambassador_tests::ambassador;
use ambassador_tests::server::{find, missing};
use anyhow::{Result, anyhow, ensure};
use clap::{Args, ValueEnum};

use crate::{packages, release, setup};
use cpu::Strangers;
use load::{Load, Scale};
use machine::Machine;
use progress::Progress;
use report::Report;
use results::{Results, Sample};
use scene::Scene;
use subject::{KERNEL_TIERS, Splice, Subject};

/// More than this many CPUs taken by others, and the figures are not to be trusted.
const DISTURBED: f64 = 0.2;

/// What to measure, and how long.
#[derive(Args)]
pub(crate) struct Options {
    /// Three short rounds: under two minutes
    #[arg(long)]
    quick: bool,
    /// How often each load goes through each subject [default: 5, with --quick 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// Only this load; may be repeated
    #[arg(long, value_enum, value_name = "LOAD")]
    only: Vec<Load>,
    /// Where results.json and report.md go
    #[arg(long, value_name = "DIR", default_value = "bench-results")]
    out: PathBuf,
}

/// Measures the binary that `AMBASSADOR_BIN` names, or else a fresh one; prints the report and
/// writes it. An error if anything failed.
pub(crate) fn run(options: &Options) -> Result<()> {
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
    eprintln!("written: {0}/results.json, {0}/report.md", options.out.display());
    let failures = report.results.failures().len();
    ensure!(failures == 0, "{failures} measurements failed");
    Ok(())
}

fn measure(options: &Options, binary: &Path) -> Result<Report> {
    limits::allow_descriptors()?;
    let scene = Scene::set()?;
    let mut notes = scene.notes.clone();
    let (subjects, mut programs) = subjects(binary, &mut notes);
    let loads = loads(&options.only, &mut notes);
    programs.extend(find("redis-server").map(|redis| (redis, "--version")));
    let (rounds, scale) = options.extent();
    notes.push(format!(
        "rounds: {rounds}; each load goes through one subject after the other; every measurement starts its \
         own proxy and server; clients and proxy share one CPU, the server has another"
    ));
    notes.push(
        "the ambassador logs warnings, HAProxy and nginx log nothing; HAProxy runs with `splice-auto`, \
         and once more with splicing forced"
            .into(),
    );

    let strangers = Strangers::watch(scene.cpus)?;
    let mut results = Results::default();
    let mut progress = Progress::new(usize::from(rounds) * loads.len() * subjects.len());
    for round in 1..=rounds {
        for &load in &loads {
            for subject in &subjects {
                let name = subject.name();
                progress.step(&format!("round {round}: {} through {name}", load.name()));
                let outcome = scene.measure(subject, load, scale);
                results.0.push(Sample { round, load, subject: name, outcome });
            }
        }
    }
    progress.end();
    let share = strangers.share()?;
    let disturbed = share > DISTURBED;
    if disturbed {
        notes.push(format!(
            "DISTURBED: other programs kept {share:.1} of the CPUs busy meanwhile; repeat this on a \
             quiet machine"
        ));
    }
    let subjects = subjects.iter().map(Subject::name).collect();
    Ok(Report { machine: Machine::look(&programs)?, notes, disturbed, loads, subjects, results })
}

impl Options {
    /// How many rounds, and how much in each.
    fn extent(&self) -> (u16, Scale) {
        let (rounds, scale) = if self.quick {
            (3, Scale { time: Duration::from_millis(300), bytes: 512 << 20, requests: 20_000 })
        } else {
            (5, Scale { time: Duration::from_secs(2), bytes: 4 << 30, requests: 100_000 })
        };
        (self.rounds.unwrap_or(rounds), scale)
    }
}

/// Programs, each with the argument that makes it say its version.
type Programs = Vec<(PathBuf, &'static str)>;

fn subjects(binary: &Path, notes: &mut Vec<String>) -> (Vec<Subject>, Programs) {
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
    let mut peer = |name: &str| {
        let program = find(name);
        match &program {
            Some(program) => programs.push((program.clone(), "-v")),
            None => notes.push(format!("skipped: {name}, which is not installed")),
        }
        program
    };
    if let Some(program) = peer("haproxy") {
        let haproxy = |splice| Subject::Haproxy { program: program.clone(), splice };
        subjects.extend([haproxy(Splice::Auto), haproxy(Splice::Always)]);
    }
    subjects.extend(peer("nginx").map(Subject::Nginx));
    (subjects, programs)
}

fn loads(only: &[Load], notes: &mut Vec<String>) -> Vec<Load> {
    let mut loads = if only.is_empty() { Load::value_variants() } else { only }.to_vec();
    if let Some(program) = missing(&["redis-server", "redis-benchmark"]) {
        loads.retain(|load| !load.wants_redis());
        notes.push(format!("skipped: the Redis loads, for {program} is not installed"));
    }
    loads
}

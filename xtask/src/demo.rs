//! `cargo xtask demo`: builds the product and shows what each tier does with real traffic here.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ::ambassador::bench::load::round_trips;
use ::ambassador::bench::load::transfer::{self, Direction};
use ::ambassador::bench::table::Table;
use ambassador_tests::ambassador;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::bench::scene::Scene;
use crate::bench::subject::Subject;
use crate::command::{stdout_of, step};
use crate::{release, setup};

/// How long small requests go to and fro on each tier.
const ROUND_TRIPS: Duration = Duration::from_secs(1);
/// How much goes up, and then down, on each tier.
const BYTES: u64 = 512 << 20;

/// Builds, sends traffic through every tier that works here, and prints a line for each; an error
/// unless every byte came out right.
pub(crate) fn run() -> Result<()> {
    setup::kernel_half()?;
    let binary = release::build()?;
    step("ask the ambassador what works here");
    let said = ambassador::doctor(&binary).or_else(|error| {
        // Without root there is no cgroup of our own, and no kernel tier either.
        eprintln!("xtask: in no cgroup of its own: {error:#}");
        let said = stdout_of(Command::new(&binary).args(["doctor", "--json"]))?;
        serde_json::from_str(&said).context("read the answer of `doctor`")
    })?;
    let doctor: Doctor = serde_json::from_value(said).context("read the answer of `doctor`")?;

    let headings =
        ["", "round trips/s", "p50 µs", "p99 µs", "up GB/s", "down GB/s", ""].map(str::to_owned);
    let mut table = Table::new(headings.into());
    let mut carried = 0;
    let mut failed = 0;
    for (name, tried) in tries(&binary, doctor) {
        let outcome = match tried {
            Try::Unavailable(reason) => Err(reason),
            Try::Carry(subject) => {
                step(&format!("{name}: 64 B round trips, {} MiB up, as much down", BYTES >> 20));
                let figures = carry(&subject);
                *if figures.is_ok() { &mut carried } else { &mut failed } += 1;
                figures.map_err(|error| format!("FAILED: {error:#}"))
            }
        };
        let (figures, remark) = match outcome {
            Ok(figures) => (figures, String::new()),
            Err(reason) => (Default::default(), reason),
        };
        table.row([vec![name], figures.into(), vec![remark]].concat());
    }
    println!("{}", table.render());
    ensure!(failed == 0, "{failed} ways did not carry the bytes as they should");
    ensure!(carried > 1, "no tier works here");
    println!("Every byte was compared with what had been sent: all of them arrived, in order.");
    Ok(())
}

/// What `ambassador doctor --json` says, as far as it is wanted here.
#[derive(Deserialize)]
struct Doctor {
    tiers: Vec<Tier>,
}

#[derive(Deserialize)]
struct Tier {
    tier: String,
    works: bool,
    reason: Option<String>,
}

/// What there is to do for a line of the table.
enum Try {
    Carry(Subject),
    Unavailable(String),
}

/// The straight way first, for comparison, then every tier.
fn tries(binary: &Path, doctor: Doctor) -> Vec<(String, Try)> {
    let straight = ("no ambassador".to_owned(), Try::Carry(Subject::NoProxy));
    let tiers = doctor.tiers.into_iter().map(|Tier { tier, works, reason }| {
        let subject = Subject::Ambassador { binary: binary.to_owned(), tier: tier.clone() };
        let tried = if works {
            Try::Carry(subject)
        } else {
            Try::Unavailable(reason.unwrap_or_else(|| "no reason given".into()))
        };
        (tier, tried)
    });
    std::iter::once(straight).chain(tiers).collect()
}

/// Sends traffic through one subject; every byte of it is checked.
fn carry(subject: &Subject) -> Result<[String; 5]> {
    let scene = Scene::on_loopback()?;
    let upstream = scene.built_in()?;
    scene.through(subject, scene.one_route(upstream.address()), |target| {
        let small = round_trips::run(&target, 1, 64, ROUND_TRIPS)?;
        let up = transfer::run(&target, Direction::Up, BYTES, 1)?.took;
        let down = transfer::run(&target, Direction::Down, BYTES, 1)?.took;
        let microseconds =
            |part| small.latency.at(part).map_or_else(String::new, |took| format!("{took:.1}"));
        let gigabytes = |took: Duration| format!("{:.2}", BYTES as f64 / 1e9 / took.as_secs_f64());
        Ok([
            format!("{:.0}", small.per_second),
            microseconds(0.5),
            microseconds(0.99),
            gigabytes(up),
            gigabytes(down),
        ])
    })
}

//! Everything that can go wrong, at random and for long, while every byte of every conversation is checked.
//!
//! Three ambassadors, of `direct`, `sockmap` and `splice`, lead to the same servers. Servers are killed, stopped,
//! blackholed and rude, flap, have full accept queues and slow handshakes, and all are down; names move, and the name
//! server fails; configurations change, tiers are switched off, ambassadors are killed: one of these, or up to three
//! at once. A conversation may fail when who carries or answers it is hurt meanwhile; it never loses a byte, and never
//! hangs. Others do not fail. In the end, all costs what it cost in the middle.
//!
//! By default it is a slice of some seconds; `AMBASSADOR_SOAK=20m` is a real one. The faults and what is said
//! follow from a seed, which is printed; `AMBASSADOR_SOAK_SEED` repeats it, as far as time can be repeated.

mod callers;
mod costs;
mod evidence;
mod faults;
mod hurts;
mod names;
mod post;
mod scene;
mod server;
mod variation;
mod verdict;

use std::io::Write;
use std::thread::scope;
use std::time::{Duration, Instant, SystemTime};

use ambassador_tests::kernel::Kernel;
use ambassador_tests::noise::Noise;
use ambassador_tests::server::missing;
use ambassador_tests::{needs, pod, skip};
use anyhow::{Context, Result};

use callers::Callers;
use costs::Costs;
use faults::Faults;
use scene::Scene;

const SLICE: Duration = Duration::from_secs(20);

#[test]
fn nothing_is_lost_and_nothing_grows_whatever_fails() -> Result<()> {
    needs!(Direct);
    needs!(Sockmap);
    let pod = pod!("nft", "dnsmasq");
    if let Some(program) = missing(&["bpftool"]) {
        skip::in_part(&format!("without {program} nobody counts the entries of the kernel's maps"));
    }
    let (length, seed) = (length()?, seed()?);
    tell(&format!("AMBASSADOR_SOAK_SEED={seed}, for {length:?}"));
    let mut noise = Noise::new(seed);
    let kernel = Kernel::watch()?;
    let scene = Scene::new(&pod)?;
    let callers = Callers::new(&scene);
    let mut faults = Faults::new(&mut noise);
    let soaked = scope(|scope| {
        let calling = callers.start(scope, &mut noise);
        let mut soak = || -> Result<(Costs, Costs)> {
            // Ambassadors are killed in the first half, and in the second live long enough to grow.
            faults.happen(&scene, Instant::now() + length / 2, true)?;
            let before = callers.pause(|| Costs::of(&scene))?;
            faults.happen(&scene, Instant::now() + length / 2, false)?;
            let after = callers.pause(|| Costs::of_when_not_above(&scene, &before))?;
            Ok((before, after))
        };
        let soaked = soak();
        callers.stop();
        let calls = calling.into_iter().map(|it| it.join().expect("a caller does not panic"));
        let calls: Vec<_> = calls.flatten().collect();
        tell(&format!("faults: {faults}"));
        let soaked = soaked?;
        let summary = verdict::on(&calls, &scene).context("what was said")?;
        summary.lines().for_each(|line| tell(&line));
        anyhow::Ok(soaked)
    });
    let (before, after) = soaked.with_context(|| format!("AMBASSADOR_SOAK_SEED={seed}"))?;
    tell(&format!("in the middle: {before:?}"));
    tell(&format!("in the end: {after:?}"));
    scene.end()?;
    kernel.is_unharmed()
}

fn length() -> Result<Duration> {
    let Ok(length) = std::env::var("AMBASSADOR_SOAK") else { return Ok(SLICE) };
    let (number, unit) = length.split_at(length.len().saturating_sub(1));
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        _ => anyhow::bail!("AMBASSADOR_SOAK is {length:?}, where 90s or 20m could be"),
    };
    Ok(Duration::from_secs(number.parse::<u64>().context("parse AMBASSADOR_SOAK")? * seconds))
}

fn seed() -> Result<u64> {
    match std::env::var("AMBASSADOR_SOAK_SEED") {
        Ok(seed) => seed.parse().context("parse AMBASSADOR_SOAK_SEED"),
        Err(_) => Ok(SystemTime::UNIX_EPOCH.elapsed().context("ask for a seed")?.as_secs()),
    }
}

/// Says something past the capture of a test that passes.
fn tell(text: &str) {
    // Losing it is no reason to fail.
    let _ = writeln!(std::io::stderr(), "soak: {text}");
}

//! Whether what happened may happen: what callers saw, what servers reported, and who was hurt meanwhile.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::{Duration, Instant};

use ambassador_tests::conversation::LOST;
use ambassador_tests::wait::{SOON, until};
use anyhow::{Context, Result, ensure};

use crate::callers::Call;
use crate::hurts::{Hurts, Part};
use crate::scene::Scene;

/// No conversation takes so long, on a slow machine either.
pub(crate) const LONGEST: Duration = Duration::from_secs(60);

/// A server is slower than its caller by so much: what it has not heard by the end of that, it may never hear.
const BEHIND: Duration = Duration::from_secs(5);

/// Of the conversations by each tier that was wanted.
#[derive(Default)]
pub(crate) struct Summary(BTreeMap<String, Figures>);

#[derive(Default)]
struct Figures {
    whole: u32,
    by_kernel: u32,
    bytes: usize,
    failed: u32,
    longest: Duration,
}

pub(crate) fn on(calls: &[Call], scene: &Scene) -> Result<Summary> {
    let known: HashMap<_, _> = calls.iter().map(|call| (call.seed, call)).collect();
    let mut summary = Summary::default();
    for call in calls {
        let figures = summary.0.entry(call.way.to_string()).or_default();
        let took = call.time.1 - call.time.0;
        figures.longest = figures.longest.max(took);
        ensure!(took < LONGEST, "it took {took:?}: {call:?}");
        match &call.outcome {
            Ok(()) => {
                figures.whole += 1;
                figures.by_kernel += u32::from(call.is_direct);
                figures.bytes += call.bytes;
            }
            Err(error) => {
                figures.failed += 1;
                is_excused(call, Duration::ZERO, &format!("{error:?}"), &scene.hurts)?;
            }
        }
    }
    // The last ones may still be on their way.
    let mut untold = Vec::new();
    let all_told = until("the report of every conversation", SOON, || {
        let told = told(scene);
        for (seed, what) in told.iter().filter(|(_, what)| *what != "ok") {
            let call = known.get(seed).context("find a conversation that was reported")?;
            is_excused(call, BEHIND, what, &scene.hurts).context("what a server reported")?;
        }
        untold = calls.iter().filter(|call| call.outcome.is_ok()).collect();
        untold.retain(|call| !told.contains_key(&call.seed));
        untold.retain(|call| when_hurt(call, BEHIND, &scene.hurts).is_none());
        Ok(untold.is_empty().then_some(()))
    });
    all_told.with_context(|| format!("untold: {untold:?}"))?;
    Ok(summary)
}

/// By their seeds.
fn told(scene: &Scene) -> HashMap<u64, String> {
    let reports = scene.reports();
    let lines = reports.iter().flat_map(|it| it.lines());
    let words = lines.filter_map(|line| {
        let (seed, what) = line.split_once(' ')?;
        Some((seed.parse().ok()?, what.to_owned()))
    });
    words.collect()
}

/// It failed as a whole, soon after somebody who took part was hurt.
fn is_excused(call: &Call, behind: Duration, what: &str, hurts: &Hurts) -> Result<()> {
    ensure!(!what.contains(LOST), "{what}: {call:?}");
    let hurt = when_hurt(call, behind, hurts);
    let hurt = hurt.with_context(|| format!("nobody was hurt, but {what}: {call:?}"))?;
    let after = call.time.1.saturating_duration_since(hurt.max(call.time.0));
    ensure!(after < SOON, "it failed only {after:?} later: {what}: {call:?}");
    Ok(())
}

/// When somebody was hurt who took part in it, or may have.
fn when_hurt(call: &Call, behind: Duration, hurts: &Hurts) -> Option<Instant> {
    hurts.during((call.time.0, call.time.1 + behind), |part| match part {
        Part::Server(server) => call.server.is_none_or(|it| it == server),
        Part::Ambassador(post) => post == call.post && !call.is_direct,
    })
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (tier, it) in &self.0 {
            let Figures { whole, by_kernel, bytes, failed, longest } = it;
            let mib = bytes >> 20;
            writeln!(
                f,
                "{tier}: {whole} conversations of {mib} MiB whole, {by_kernel} of them past the ambassador; \
                 {failed} failed with who was hurt; the longest took {longest:?}"
            )?;
        }
        Ok(())
    }
}

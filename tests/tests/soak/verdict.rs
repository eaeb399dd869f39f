//! Whether what happened may happen: what callers saw, and what servers reported.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use ambassador_tests::wait::{SOON, until};
use anyhow::{Context, Result, ensure};

use crate::callers::Call;
use crate::evidence::Evidence;
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
    /// Begun while there was no server.
    held: u32,
    bytes: usize,
    failed: u32,
    /// Because the ambassador took the server for lost.
    given_up: u32,
    longest: (Duration, String),
}

pub(crate) fn on(calls: &[Call], scene: &Scene) -> Result<Summary> {
    let evidence = Evidence::of(scene)?;
    let known: HashMap<_, _> = calls.iter().map(|call| (call.seed, call)).collect();
    let mut summary = Summary::default();
    for call in calls {
        let figures = summary.0.entry(call.way.to_string()).or_default();
        let took = call.time.1 - call.time.0;
        if took > figures.longest.0 {
            figures.longest = (took, evidence.story(call));
        }
        // Whoever waits in vain gives up after `SOON`: that is a hang, whoever was hurt meanwhile.
        let most = if call.outcome.is_ok() { LONGEST } else { SOON };
        ensure!(took < most, "it took {took:?}: {}", evidence.story(call));
        let held = evidence.is_to_be_held(call);
        match &call.outcome {
            Ok(()) => {
                figures.whole += 1;
                figures.by_kernel += u32::from(call.is_direct());
                figures.held += u32::from(held);
                figures.bytes += call.bytes;
            }
            Err(error) => {
                ensure!(!held, "it was to be held: {}", evidence.story(call));
                evidence.excuses(call, Duration::ZERO, &format!("{error:#}"))?;
                figures.failed += 1;
                figures.given_up += u32::from(evidence.is_given_up(call));
            }
        }
    }
    // The last ones may still be on their way.
    let mut untold = Vec::new();
    let all_told = until("the report of every conversation", SOON, || {
        let told = told(scene);
        for (seed, what) in told.iter().filter(|(_, what)| *what != "ok") {
            let call = known.get(seed).context("find a conversation that was reported")?;
            evidence.excuses(call, BEHIND, what).context("what a server reported")?;
        }
        untold = calls.iter().filter(|call| call.outcome.is_ok()).collect();
        untold.retain(|call| !told.contains_key(&call.seed));
        untold.retain(|call| evidence.when_hurt(call, BEHIND).is_none());
        Ok(untold.is_empty().then_some(()))
    });
    all_told.with_context(|| format!("untold: {untold:?}"))?;
    Ok(summary)
}

/// By their seeds.
fn told(scene: &Scene) -> HashMap<u64, String> {
    let reports: Vec<_> = scene.servers().iter().map(|server| server.reports()).collect();
    let lines = reports.iter().flat_map(|it| it.lines());
    let words = lines.filter_map(|line| {
        let (seed, what) = line.split_once(' ')?;
        Some((seed.parse().ok()?, what.to_owned()))
    });
    words.collect()
}

impl Summary {
    /// One a tier.
    pub(crate) fn lines(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(tier, it)| {
            let Figures { whole, by_kernel, held, bytes, failed, given_up, longest } = it;
            let (mib, (took, story)) = (bytes >> 20, longest);
            format!(
                "{tier}: {whole} conversations of {mib} MiB whole, {by_kernel} of them past the ambassador, \
                 {held} held while there was no server; {failed} failed with who was hurt, {given_up} of them \
                 given up; the longest took {:.1} s: {story}",
                took.as_secs_f64()
            )
        })
    }
}

//! Reloads while connections are used that the kernel carries, or have shortcuts: those go on, new ones get theirs, and
//! in the end neither the process nor the kernel's maps hold more than after the first few.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::echo::Echo;
use ambassador_tests::peer::Peer;
use ambassador_tests::pins::Map;
use ambassador_tests::place::Place;
use ambassador_tests::wait::until_true;
use ambassador_tests::way::Way;
use ambassador_tests::{installed, needs};
use anyhow::{Context, Result, anyhow, ensure};

use crate::storm::Costs;
use crate::{loopback, moving};

const RELOADS: usize = 100;
/// Connections that are used all the time, and those who make short ones.
const KEPT: usize = 4;
const CALLERS: usize = 2;
/// Between two questions: the machine has others to serve.
const PACE: Duration = Duration::from_millis(1);

#[test]
fn a_hundred_reloads_leave_connections_and_costs_as_they_were() -> Result<()> {
    needs!(Direct);
    needs!(Sockmap);
    installed!("bpftool");
    for way in [Way::Direct, Way::Sockmap, Way::Splice] {
        let place = Place::here().with_bpffs()?;
        let servers = [Echo::greeting("a")?, Echo::greeting("b")?];
        let [busy, changing] = [loopback(&place)?, loopback(&place)?];
        let text = |round| moving(round, &servers, [&busy, &changing]);
        let ambassador = way.launch_in(&place)?.config(&text(0))?.start()?;
        let kept = (0..KEPT).map(|_| connect(&busy)).collect::<Result<Vec<_>>>()?;
        let load = Load { routes: [&busy, &changing], kept: &kept };
        load.during(|| reload(&ambassador, text, 1..=RELOADS / 10))
            .with_context(|| format!("by {way}"))?;
        only_the_kept_are_left(&ambassador, way)?;
        let before = (Costs::of(&ambassador)?, Map::entries(&place)?);

        let made = load
            .during(|| reload(&ambassador, text, RELOADS / 10 + 1..=RELOADS))
            .with_context(|| format!("by {way}"))?;
        only_the_kept_are_left(&ambassador, way)?;
        let labels = [("tier", &*way.to_string()), ("route", "busy")];
        let by_it = ambassador.metrics()?.sum("ambassador_connections_total", &labels);
        let enough = by_it.is_some_and(|it| it > RELOADS as f64);
        ensure!(enough, "{by_it:?} by {way}, of {made} connections");
        until_true("what it costs to be what it was", || {
            // Figures of a route that is gone, and its part of the tables, go when somebody looks.
            ambassador.get("/metrics")?;
            let most = |map: &String| before.1.get(map).copied().unwrap_or(0);
            Ok(Costs::of(&ambassador)?.are_not_above(&before.0)
                && Map::entries(&place)?.iter().all(|(map, count)| *count <= most(map)))
        })
        .with_context(|| {
            let now = (Costs::of(&ambassador), Map::entries(&place));
            format!("by {way}: {before:?}, then {now:?}")
        })?;
        drop(kept);
        ambassador.end()?;
    }
    Ok(())
}

/// Who uses the routes meanwhile.
struct Load<'a> {
    routes: [&'a Address; 2],
    kept: &'a [Peer],
}

impl Load<'_> {
    /// Does something while all connections are used, and others come and go; returns how many.
    fn during(&self, act: impl FnOnce() -> Result<()>) -> Result<usize> {
        let (stop, made) = (AtomicBool::new(false), AtomicUsize::new(0));
        let going = || !stop.load(Ordering::Relaxed);
        let keep = |client: &Peer| -> Result<()> {
            while going() {
                ask(client).context("go on during a reload")?;
            }
            Ok(())
        };
        let call = || -> Result<()> {
            while going() {
                for route in self.routes {
                    let client = connect(route).context("connect during a reload")?;
                    // Enough for a shortcut.
                    (0..3).try_for_each(|_| ask(&client)).context("be served during a reload")?;
                    made.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        };
        scope(|scope| {
            let kept = self.kept.iter().map(|client| scope.spawn(move || keep(client)));
            let callers = (0..CALLERS).map(|_| scope.spawn(call));
            let all: Vec<_> = kept.chain(callers).collect();
            let acted = act();
            stop.store(true, Ordering::Relaxed);
            let ended = all.into_iter().map(|it| it.join().map_err(|_| anyhow!("it panicked"))?);
            acted.and(ended.collect::<Result<()>>())
        })?;
        Ok(made.into_inner())
    }
}

fn reload(
    ambassador: &Ambassador,
    text: impl Fn(usize) -> String,
    rounds: RangeInclusive<usize>,
) -> Result<()> {
    for round in rounds {
        ambassador.reconfigure(&text(round))?.success()?;
    }
    Ok(())
}

/// A client of the kind that shortcuts are for, that is greeted.
fn connect(to: &Address) -> Result<Peer> {
    let client = to.connect_without_blocking()?;
    client.hear(1).context("be greeted")?;
    Ok(client)
}

fn ask(client: &Peer) -> Result<()> {
    sleep(PACE);
    client.ask(&[b'x'; 1000], &[b'x'; 1000])
}

fn only_the_kept_are_left(ambassador: &Ambassador, way: Way) -> Result<()> {
    let by_it = |told: &[serde_json::Value]| told.iter().all(|it| it["tier"] == way.to_string());
    until_true("those alone that are kept", || {
        let told = ambassador.connections()?;
        Ok(told.len() == KEPT && by_it(&told))
    })
    .with_context(|| format!("by {way}: {:?}", ambassador.connections()))
}

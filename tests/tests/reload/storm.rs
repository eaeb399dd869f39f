//! Reloads while clients connect all the time: none is refused, none is cut, and nothing is left behind.

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::scope;

use std::io::{Read, Write};

use anyhow::{Context, Result, anyhow, ensure};

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::echo::Echo;
use ambassador_tests::place::Place;
use ambassador_tests::wait::until_true;
use ambassador_tests::way::Way;

use crate::{config, loopback, moving, reaches, route};

const RELOADS: usize = 100;

#[test]
fn nobody_is_refused_while_endpoints_change_a_hundred_times() -> Result<()> {
    for way in Way::proxied()? {
        let here = Place::here();
        let servers = [Echo::greeting("a")?, Echo::greeting("b")?];
        let [busy, changing] = [loopback(&here)?, loopback(&here)?];
        let text = |round| moving(round, &servers, [&busy, &changing]);
        let ambassador = way.launch(&here)?.config(&text(0))?.start()?;
        let held = reaches(&busy, "a")?;
        let (stop, made) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut before = None;
        let stormed = scope(|scope| {
            let clients: Vec<_> =
                (0..2).map(|_| scope.spawn(|| storm(&busy, &stop, &made))).collect();
            let reloaded = (1..=RELOADS).try_for_each(|round| {
                if round == RELOADS / 10 {
                    before = Some(Costs::of(&ambassador)?);
                }
                ambassador.reconfigure(&text(round))?.success().map(drop)
            });
            stop.store(true, Ordering::Relaxed);
            let ended =
                clients.into_iter().map(|it| it.join().map_err(|_| anyhow!("it panicked"))?);
            reloaded.and(ended.collect::<Result<()>>())
        });
        stormed.with_context(|| format!("by {way}"))?;
        ensure!(made.load(Ordering::Relaxed) > 100, "no storm at all");
        held.ask(b"still here", b"still here")?;
        drop(held);
        let before = before.context("look at the costs")?;
        until_true("what it costs to be what it was", || {
            // Everybody else's is given back as connections end.
            Ok(Costs::of(&ambassador)?.are_not_above(&before))
        })
        .with_context(|| format!("by {way}: {before:?}, then {:?}", Costs::of(&ambassador)))?;
        until_true("figures of routes that are gone to go", || {
            let metrics = ambassador.get("/metrics")?.body;
            let is_told = |round: &usize| metrics.contains(&format!("\"other-{round}\""));
            Ok((0..=RELOADS).filter(is_told).eq([RELOADS]))
        })
        .with_context(|| format!("by {way}"))?;
        ambassador.end()?;
    }
    Ok(())
}

/// Connects again and again, and counts how often; whoever accepts greets with one byte.
fn storm(to: &Address, stop: &AtomicBool, made: &AtomicU64) -> Result<()> {
    let to = to.tcp()?;
    while !stop.load(Ordering::Relaxed) {
        let mut client = TcpStream::connect(to).context("connect during a reload")?;
        client.write_all(b"x")?;
        let mut answer = [0; 2];
        client.read_exact(&mut answer).context("be answered during a reload")?;
        ensure!(answer[1] == b'x', "{answer:?}");
        made.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// What a process costs.
#[derive(Debug)]
pub(crate) struct Costs {
    files: usize,
    kib: u64,
}

impl Costs {
    pub(crate) fn of(ambassador: &Ambassador) -> Result<Self> {
        let process = &ambassador.process;
        Ok(Self { files: process.descriptors()?.len(), kib: process.rss()? / 1024 })
    }

    /// But for what is always in motion.
    pub(crate) fn are_not_above(&self, before: &Self) -> bool {
        self.files <= before.files + 2 && self.kib <= before.kib + 4096
    }
}

#[test]
fn whoever_waits_at_a_listener_that_goes_is_served() -> Result<()> {
    let here = Place::here();
    let echo = Echo::greeting("e")?;
    let [stays, goes] = [loopback(&here)?, loopback(&here)?];
    let one = config(&[route("stays", &stays, echo.address())]);
    let both =
        config(&[route("stays", &stays, echo.address()), route("goes", &goes, echo.address())]);
    let ambassador = Way::Splice.launch(&here)?.config(&both)?.start()?;
    for _ in 0..20 {
        let stop = AtomicBool::new(false);
        let closed = scope(|scope| {
            let clients: Vec<_> =
                (0..2).map(|_| scope.spawn(|| until_refused(&goes, &stop))).collect();
            let removed = ambassador.reconfigure(&one).and_then(|told| told.success());
            stop.store(true, Ordering::Relaxed);
            let ended =
                clients.into_iter().map(|it| it.join().map_err(|_| anyhow!("it panicked"))?);
            removed.map(drop).and(ended.collect::<Result<()>>())
        });
        closed?;
        ambassador.reconfigure(&both)?.success()?;
    }
    Ok(())
}

/// Connects until that is refused; whoever has connected must be answered.
fn until_refused(to: &Address, stop: &AtomicBool) -> Result<()> {
    let to = to.tcp()?;
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut client) = TcpStream::connect(to) else { break };
        let mut greeting = [0];
        client.read_exact(&mut greeting).context("be served by a listener that goes")?;
    }
    Ok(())
}

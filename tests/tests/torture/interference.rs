//! Conversations that somebody interferes with: the kill switch, a kill, a drain with a deadline.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::scope;

use ambassador_tests::address::Family;
use ambassador_tests::conversation::Plan;
use ambassador_tests::needs;
use ambassador_tests::noise::Noise;
use ambassador_tests::wait::until_true;
use ambassador_tests::way::{Way, Wire};
use anyhow::{Context, Result, ensure};

use crate::{Torture, alone};

#[test]
fn kill_switch_loses_nothing_on_sockmap() -> Result<()> {
    needs!(Sockmap);
    survives_the_kill_switch(Way::Sockmap)
}

#[test]
fn kill_switch_loses_nothing_on_auto() -> Result<()> {
    needs!(Vouched);
    survives_the_kill_switch(Way::Vouched)
}

#[test]
fn kill_switch_loses_nothing_on_direct() -> Result<()> {
    needs!(Direct);
    survives_the_kill_switch(Way::Direct)
}

#[test]
fn drain_cuts_with_resets_on_copy() -> Result<()> {
    cut_with_resets(Way::Copy)
}

#[test]
fn drain_cuts_with_resets_on_splice() -> Result<()> {
    cut_with_resets(Way::Splice)
}

#[test]
fn drain_cuts_with_resets_on_sockmap() -> Result<()> {
    needs!(Sockmap);
    cut_with_resets(Way::Sockmap)
}

/// Shortcuts close and new clients take `splice`; then both may be as before. What is open goes on.
fn survives_the_kill_switch(way: Way) -> Result<()> {
    let _alone = alone();
    let wire = Wire::new(way, Family::Tcp)?;
    let ambassador = wire.road.ambassador.as_ref().context("find the ambassador")?;
    let mut torture = Torture::new()?;
    // It takes the way for certain, because the switch has not been thrown yet, and keeps it.
    let client = wire.road.address.connect_without_blocking()?;
    let server = wire.listener.accept()?;
    for _ in 0..3 {
        client.say(b"before")?;
        ensure!(server.hear(6)? == b"before");
    }
    let (thrown, over) = (AtomicU32::new(0), AtomicBool::new(false));
    scope(|scope| {
        let throwing = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::SeqCst) {
                for tier in ["splice", "auto"] {
                    ambassador.command(&["tier", "all", tier])?.success()?;
                }
                thrown.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
        let mut conversed = Ok(());
        while conversed.is_ok()
            && thrown.load(Ordering::SeqCst) < 2 * torture.rounds
            && !throwing.is_finished()
        {
            conversed = torture.round(&wire, Plan::of, || Ok(()));
        }
        over.store(true, Ordering::SeqCst);
        throwing.join().expect("the switch does not panic")?;
        conversed
    })?;
    client.say(b"after")?;
    client.finish()?;
    ensure!(server.hear_to_end()? == b"after");
    drop(server);
    client.hear_end()?;
    wire.road.had_shortcuts(1)?;
    torture.kernel.is_unharmed()
}

/// Its listeners and hooks are gone, and nobody but it notices.
#[test]
fn killed_ambassador_leaves_direct_connections_unharmed() -> Result<()> {
    needs!(Direct);
    let _alone = alone();
    let wire = Wire::new(Way::Direct, Family::Tcp)?;
    let ambassador = wire.road.ambassador.as_ref().context("find the ambassador")?;
    let mut torture = Torture::new()?;
    // It is in mid-stream for certain, because its server does not read.
    let (client, server) = wire.pair()?;
    let mut said = Noise::new(1);
    let taken = client.say_until_held_back(&mut said)?;
    torture.round(&wire, Plan::of, || {
        ambassador.process.signal(libc::SIGKILL)?;
        until_true("the ambassador to be gone", || Ok(ambassador.get("/livez").is_err()))
    })?;
    let mut heard = Noise::new(1);
    server.hear_noise(&mut heard, taken)?;
    client.say_noise(&mut said, 1000)?;
    server.hear_noise(&mut heard, 1000)?;
    server.finish()?;
    client.hear_end()?;
    client.finish()?;
    server.hear_end()?;
    torture.kernel.is_unharmed()
}

/// A part must not be taken for the whole.
fn cut_with_resets(way: Way) -> Result<()> {
    let _alone = alone();
    let mut wire = Wire::with(way, &[("--drain-deadline", "1s")])?;
    let ambassador = wire.road.ambassador.take().context("find the ambassador")?;
    let mut torture = Torture::new()?;
    // One direction has ended in order; that does not go for the other.
    let (client, server) = wire.pair()?;
    client.finish()?;
    server.hear_end()?;
    torture.round(&wire, Plan::until_cut, || ambassador.process.signal(libc::SIGTERM))?;
    client.hear_reset().context("a client that has finished")?;
    server.notice_failure().context("the server of a client that has finished")?;
    ambassador.ends_with(1)?;
    torture.kernel.is_unharmed()
}

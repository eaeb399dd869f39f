//! What each mode uses of memory and CPU while the limits of its manifest are in force: idle, with 1,000
//! connections, and under load. deploy/README.md shows what these print.

use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use ambassador_tests::noise::Noise;
use ambassador_tests::peer::Peer;
use ambassador_tests::podman::account::Account;
use ambassador_tests::skip;
use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::edit::{container, edited};
use crate::{AMBASSADOR, APP, ROUTE, Scene, overlay, podman_and_kubectl};

const MIB: f64 = 1024.0 * 1024.0;
/// So many connections wait.
const WAITING: usize = 1000;
/// And so many ask one question after the other, for so long.
const ASKING: usize = 50;
const LOAD: Duration = Duration::from_secs(1);
const QUESTION: [u8; 64] = [b'?'; 64];
/// And so many carry so many bytes there and back.
const CARRYING: usize = 4;
const BYTES: usize = 8 << 20;
/// An app that asks so many questions, each on a connection of its own.
const APPS: usize = 100;
const QUESTIONS: &str = "n=0; while test $n -lt 100; do \
     printf question | nc 127.0.0.1 5432 || exit 1; n=$((n + 1)); done";

#[test]
fn restricted_stays_within_its_limit() -> Result<()> {
    stays_within("restricted")
}

#[test]
fn accelerated_stays_within_its_limit() -> Result<()> {
    stays_within("accelerated")
}

#[test]
fn loader_stays_within_its_limit() -> Result<()> {
    stays_within("loader")
}

#[test]
fn a_limit_of_cpu_slows_it_down_and_loses_nothing() -> Result<()> {
    /// A tenth of a CPU, as people give it to sidecars.
    const LIMIT: f64 = 0.1;
    let podman = podman_and_kubectl!();
    let work = |manifest: &str| {
        let scene = Scene::new(&podman, manifest)?;
        let Some(account) = scene.played.account(AMBASSADOR)? else { return Ok(None) };
        let connections = connections(&scene, ASKING)?;
        let (asked, used) = of(&account, || ask_for(&connections, LOAD))?;
        drop(connections);
        scene.played.delete()?;
        Ok::<_, anyhow::Error>(Some((asked as f64, used)))
    };
    let limited = edited("restricted", |pod| {
        container(pod, AMBASSADOR)?["resources"]["limits"]["cpu"] = json!("100m");
        Ok(())
    })?;
    let (Some((free, took)), Some((held_up, had))) =
        (work(&overlay("restricted")?)?, work(&limited)?)
    else {
        skip!("no limits are in force here");
    };
    println!("{free} questions with {took:.3} CPUs, {held_up} with {had:.3}");
    ensure!(had < 2.0 * LIMIT, "the limit is not in force: {had:.3} CPUs");
    let kept = (held_up / had) / (free / took);
    ensure!(kept > 0.4, "of what a second of CPU does, {kept:.2} is left under the limit");
    Ok(())
}

fn stays_within(mode: &str) -> Result<()> {
    let podman = podman_and_kubectl!();
    let scene = Scene::new(&podman, &overlay(mode)?)?;
    let Some(account) = scene.played.account(AMBASSADOR)? else {
        skip!("no limit of memory is in force here");
    };
    let (at_start, idle) = (account.peak()?, account.memory()?);
    let ((), idle_cpu) = of(&account, nothing)?;

    let connections = connections(&scene, WAITING)?;
    let waiting = account.memory()?;
    let ((), waiting_cpu) = of(&account, nothing)?;
    let (asked, asking_cpu) = of(&account, || ask_for(&connections[..ASKING], LOAD))?;
    let asking = account.peak()?;
    let ((), carrying_cpu) = of(&account, || transfer(&connections[..CARRYING]))?;
    let peak = account.peak()?;
    let ((), app_cpu) = of(&account, || questions_of_the_app(&scene))?;
    connections.iter().try_for_each(|it| it.ask(&QUESTION, &QUESTION)).context("after the load")?;
    drop(connections);

    let mib = |bytes: u64| bytes as f64 / MIB;
    println!(
        "{mode}: MiB: {:.1} at the start, {:.1} idle, {:.1} with {WAITING} connections, {:.1} while {ASKING} of \
         them ask, {:.1} while {CARRYING} carry bytes, {:.0} allowed\n{mode}: CPUs: {idle_cpu:.3} idle, \
         {waiting_cpu:.3} with connections, {asking_cpu:.3} for {:.0} questions a second, {carrying_cpu:.3} while \
         bytes are carried, {app_cpu:.3} for connections of the app",
        mib(at_start),
        mib(idle),
        mib(waiting),
        mib(asking),
        mib(peak),
        mib(account.limit()?),
        asked as f64 / LOAD.as_secs_f64(),
    );
    ensure!(account.killed()? == 0, "something was killed");
    ensure!(idle_cpu < 0.05, "{idle_cpu:.3} CPUs for nothing");
    ensure!(peak <= account.limit()?, "{:.1} MiB at the peak", mib(peak));
    scene.played.delete()
}

/// Does something, and tells how many CPUs it kept busy.
fn of<T>(account: &Account, act: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let (begun, before) = (Instant::now(), account.cpu()?);
    let done = act()?;
    let used = account.cpu()?.saturating_sub(before);
    Ok((done, used.as_secs_f64() / begun.elapsed().as_secs_f64()))
}

fn nothing() -> Result<()> {
    sleep(LOAD);
    Ok(())
}

/// Connections that have been answered, of another cgroup than the Pod's: every mode relays them.
fn connections(scene: &Scene<'_>, count: usize) -> Result<Vec<Peer>> {
    let connect = || {
        let connection = ROUTE.connect()?;
        connection.ask(&QUESTION, &QUESTION)?;
        Ok(connection)
    };
    scene.played.inside.enter(|| (0..count).map(|_| connect()).collect())
}

/// How many questions were answered, of connections that ask for so long.
fn ask_for(connections: &[Peer], time: Duration) -> Result<usize> {
    let until = Instant::now() + time;
    let ask = |connection: &Peer| {
        let mut answered = 0;
        while Instant::now() < until {
            connection.ask(&QUESTION, &QUESTION)?;
            answered += 1;
        }
        Ok(answered)
    };
    scope(|scope| {
        let asking: Vec<_> = connections.iter().map(|it| scope.spawn(move || ask(it))).collect();
        asking.into_iter().map(|it| it.join().expect("asking does not panic")).sum()
    })
}

/// Bytes there and back on each of these connections, all of them compared.
fn transfer(connections: &[Peer]) -> Result<()> {
    scope(|scope| {
        let transfers = connections.iter().map(|connection| {
            let saying = scope.spawn(move || connection.say_noise(&mut Noise::new(1), BYTES));
            let hearing = scope.spawn(move || connection.hear_noise(&mut Noise::new(1), BYTES));
            [saying, hearing]
        });
        let transfers: Vec<_> = transfers.flatten().collect();
        transfers.into_iter().try_for_each(|it| it.join().expect("a transfer does not panic"))
    })
}

/// The app's own questions, by the tier in force.
fn questions_of_the_app(scene: &Scene<'_>) -> Result<()> {
    let answers = scene.played.exec(APP, &["sh", "-c", QUESTIONS])?.success()?;
    ensure!(answers == "question".repeat(APPS), "{answers}");
    Ok(())
}

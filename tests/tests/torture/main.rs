//! Torture: hundreds of connections at once that do everything an app may do, in an order nobody
//! foresaw, and whose every byte is checked. It takes nothing but this binary, the ambassador's
//! (`AMBASSADOR_BIN`) and a loopback.
//!
//! By default it is a slice of some seconds a way; `AMBASSADOR_TORTURE=full` is all of it. What each
//! connection does follows from a seed, which is printed; `AMBASSADOR_TORTURE_SEED` repeats it.

mod interference;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant, SystemTime};

use ambassador_tests::conversation::Plan;
use ambassador_tests::kernel::Kernel;
use ambassador_tests::noise::Noise;
use ambassador_tests::on_every_way;
use ambassador_tests::way::{Way, Wire};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

on_every_way! { tcp: Tcp; every_byte_survives }
on_every_way! { auto: Auto; every_byte_survives }

/// No round takes so long, on a slow machine either.
const ROUND: Duration = Duration::from_secs(180);
/// So often the kernel is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(5);

fn every_byte_survives(wire: &Wire) -> Result<()> {
    let _alone = alone();
    let mut torture = Torture::new()?;
    for _ in 0..torture.rounds {
        torture.round(wire, Plan::of, || Ok(()))?;
    }
    if wire.road.way == Way::Auto {
        took_what_it_said(wire)?;
    }
    wire.road.had_shortcuts(1)?;
    // Of a relay, two are the ambassador's; what takes a shortcut is in one of these four, too.
    let sockets = if matches!(wire.road.way, Way::Unproxied | Way::Direct) { 2 } else { 4 };
    let lent = torture.kernel.has_lent_to(sockets * u64::from(torture.at_once))?;
    println!("{} connections at once held {} KiB of the kernel", torture.at_once, lent >> 10);
    torture.kernel.is_unharmed()
}

/// Unasked, an ambassador takes `sockmap` where no client can notice it, and nowhere else.
fn took_what_it_said(wire: &Wire) -> Result<()> {
    let ambassador = wire.road.ambassador.as_ref().context("find the ambassador")?;
    let status = ambassador.command(&["status", "--json"])?.success()?;
    let status: Value = serde_json::from_str(&status).context("parse the status")?;
    let route = &status["routes"][0];
    let sockmap = [("tier", "sockmap")];
    let taken = ambassador.metrics()?.sum("ambassador_connections_total", &sockmap).unwrap_or(0.0);
    println!(
        "{taken} connections by sockmap; the route is of {}: {}",
        route["tier"], route["why_not"]
    );
    ensure!((taken > 0.0) == (route["tier"] == "sockmap"), "{taken} connections took it: {route}");
    Ok(())
}

/// One test at a time: sockets are limited, and the kernel's memory is everybody's.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Rounds of conversations, all that there are or a slice of them.
struct Torture {
    rounds: u32,
    at_once: u32,
    seed: u64,
    seeds: Noise,
    kernel: Kernel,
}

impl Torture {
    fn new() -> Result<Self> {
        let full = std::env::var_os("AMBASSADOR_TORTURE").is_some_and(|extent| extent == "full");
        let (rounds, at_once) = if full { (25, 200) } else { (2, 60) };
        let seed = match std::env::var("AMBASSADOR_TORTURE_SEED") {
            Ok(seed) => seed.parse().context("parse AMBASSADOR_TORTURE_SEED")?,
            Err(_) => SystemTime::UNIX_EPOCH.elapsed().context("ask for a seed")?.as_secs(),
        };
        println!("AMBASSADOR_TORTURE_SEED={seed}");
        Ok(Self { rounds, at_once, seed, seeds: Noise::new(seed), kernel: Kernel::watch()? })
    }

    /// One round, with what happens meanwhile, once all conversations have been opened.
    fn round(
        &mut self,
        wire: &Wire,
        plan: impl Fn(&mut Noise) -> Plan,
        meanwhile: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let began = Instant::now();
        scope(|scope| {
            let mut conversations = Vec::new();
            for number in 0..self.at_once {
                let mut plan = plan(&mut Noise::new(self.seeds.below(u64::MAX)));
                let told = format!("connection {number}, {:?}", plan.course);
                let (client, server) = plan.open(wire).with_context(|| told.clone())?;
                let client = scope.spawn(move || plan.client.take_part(client));
                let server = scope.spawn(move || plan.server.take_part(server));
                conversations.push((told, client, server));
            }
            meanwhile()?;
            while conversations
                .iter()
                .any(|(_, client, server)| !client.is_finished() || !server.is_finished())
            {
                self.kernel.look()?;
                sleep(LOOK);
            }
            for (told, client, server) in conversations {
                let client = client.join().expect("a client does not panic");
                let server = server.join().expect("a server does not panic");
                // The failure of one is often that of the other.
                ensure!(
                    client.is_ok() && server.is_ok(),
                    "{told}: the client: {client:#?}; the server: {server:#?}"
                );
            }
            Ok(())
        })
        .with_context(|| format!("AMBASSADOR_TORTURE_SEED={}", self.seed))?;
        ensure!(began.elapsed() < ROUND, "a round took {:?}", began.elapsed());
        Ok(())
    }
}

//! What connections cost while they do nothing, and that what they cost is given back.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador::Launch;
use ambassador_tests::echo::Echo;
use ambassador_tests::noise::Noise;
use ambassador_tests::peer::Peer;
use ambassador_tests::place::Place;
use ambassador_tests::process::run;
use ambassador_tests::wait::{SOON, until_true};
use ambassador_tests::way::{Way, Wire};
use serde_json::Value;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// One idle connection, as it was promised.
const EACH: u64 = 8 * KIB;

#[test]
fn an_idle_connection_costs_at_most_eight_kibibytes() -> Result<()> {
    for way in Way::RELAYS {
        let wire = Wire::new(way, Family::Tcp)?;
        let mut idle = used(&wire, 100)?;
        let before = rss(&wire)?;
        idle.extend(used(&wire, 1000)?);
        let each = rss(&wire)?.saturating_sub(before) / 1000;
        ensure!(each <= EACH, "by {way}: {each} bytes for each idle connection");
    }
    Ok(())
}

#[test]
fn five_thousand_idle_connections_fit_into_64_mebibytes() -> Result<()> {
    // Both ends of each are ours; the limit is inherited by the ambassador, whose share is the same.
    const FILES: u64 = 15_000;
    let limits = std::fs::read_to_string("/proc/self/limits").context("read our limits")?;
    let hard = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .and_then(|line| line.split_whitespace().nth(1))
        .context("find the limit of open files")?;
    if hard != "unlimited" && hard.parse::<u64>().context("parse the limit")? < FILES {
        ambassador_tests::skip!("5,000 connections need {FILES} open files, {hard} are allowed");
    }
    let raise = format!("--nofile={FILES}:");
    let me = std::process::id().to_string();
    run(Command::new("prlimit").args(["--pid", &me, &raise]), SOON)?;

    for way in Way::RELAYS {
        let wire = Wire::new(way, Family::Tcp)?;
        let mut idle = used(&wire, 100)?;
        let before = rss(&wire)?;
        idle.extend(used(&wire, 4900)?);
        let all = rss(&wire)?;
        ensure!(all < 64 * MIB, "by {way}: {} KiB with 5,000 connections", all / KIB);
        let each = all.saturating_sub(before) / 4900;
        ensure!(each <= EACH, "by {way}: {each} bytes for each idle connection");
    }
    Ok(())
}

#[test]
fn memory_of_a_burst_is_given_back() -> Result<()> {
    for way in Way::RELAYS {
        let wire = Wire::new(way, Family::Tcp)?;
        burst(&wire)?;
        let floor = rss(&wire)?;
        for _ in 0..3 {
            burst(&wire)?;
        }
        until_true("the memory of a burst to be given back", || Ok(rss(&wire)? < floor + 4 * MIB))
            .with_context(|| {
                format!("by {way}: {} KiB after {}", rss(&wire).unwrap_or(0) / KIB, floor / KIB)
            })?;
        ensure!(rss(&wire)? < 32 * MIB, "by {way}: {} KiB after a burst", rss(&wire)? / KIB);
    }
    Ok(())
}

#[test]
fn connections_above_the_cap_are_refused_and_counted() -> Result<()> {
    let here = Place::here();
    let echo = Echo::new(Family::Tcp)?;
    let route: Address = SocketAddr::from((Ipv4Addr::LOCALHOST, here.port()?)).into();
    let config = format!(
        "version: 1
routes:
  - {{ name: capped, listen: '{route}', upstream: echo, max_connections: 3 }}
upstreams:
  echo: {{ endpoints: ['{}'] }}
",
        echo.address()
    );
    let ambassador = Launch::new(&here)?.config(&config)?.start()?;
    let held = (0..3)
        .map(|_| {
            let client = route.connect()?;
            client.ask(b"in", b"in").map(|()| client)
        })
        .collect::<Result<Vec<_>>>()?;
    route.connect()?.hear_close().context("the fourth connection")?;
    until_true("the refusal in the metrics", || {
        let refused = [("route", "capped"), ("outcome", "refused")];
        Ok(ambassador.metrics()?.sum("ambassador_connections_total", &refused) == Some(1.0))
    })?;
    until_true("the refusal in the log", || {
        Ok(ambassador.log()?.iter().any(|line| {
            line["level"] == "WARN"
                && line["route"] == "capped"
                && line.to_string().contains("max_connections")
        }))
    })?;
    ensure!(ambassador.metrics()?.sum("ambassador_connections_active", &[]) == Some(3.0));

    // A burst of them is told in a few lines that leave none out.
    let burst = Instant::now();
    for _ in 0..300 {
        route.connect()?.hear_close()?;
    }
    let lines = || -> Result<Vec<Value>> {
        let is_one = |line: &Value| line["level"] == "WARN" && line["route"] == "capped";
        Ok(ambassador.log()?.into_iter().filter(is_one).collect())
    };
    until_true("every refusal in the log", || {
        // What is kept back is told with the next one.
        route.connect()?.hear_close()?;
        let told: u64 = lines()?.iter().filter_map(|line| line["refused"].as_u64()).sum();
        Ok(told > 300)
    })?;
    let (lines, most) = (lines()?.len() as u64, burst.elapsed().as_secs() + 3);
    ensure!(lines <= most, "{lines} lines for 301 refusals");
    held.iter().try_for_each(|client| client.ask(b"still in", b"still in"))?;

    // A place that is given back can be taken.
    drop(held);
    until_true("a free place", || Ok(route.connect()?.ask(b"in", b"in").is_ok()))
}

/// Connections that have carried something and now do nothing.
fn used(wire: &Wire, count: usize) -> Result<Vec<(Peer, Peer)>> {
    (0..count)
        .map(|_| {
            let (client, server) = wire.pair()?;
            client.say(b"?")?;
            server.hear(1)?;
            server.say(b"!")?;
            client.hear(1)?;
            Ok((client, server))
        })
        .collect()
}

/// Many transfers at once, with readers that let the writers wait.
fn burst(wire: &Wire) -> Result<()> {
    const LENGTH: usize = 3 << 20;
    std::thread::scope(|scope| {
        let transfers: Vec<_> = (0..50)
            .map(|seed| {
                let (client, server) = wire.pair()?;
                let sending = scope.spawn(move || {
                    client.say_noise(&mut Noise::new(seed), LENGTH)?;
                    client.hear_end()
                });
                Ok((seed, server, sending))
            })
            .collect::<Result<_>>()?;
        for (seed, server, sending) in transfers {
            server.hear_noise(&mut Noise::new(seed), LENGTH)?;
            drop(server);
            sending.join().expect("a sender does not panic")?;
        }
        Ok(())
    })
}

fn rss(wire: &Wire) -> Result<u64> {
    let ambassador = wire.road.ambassador.as_ref().context("find the ambassador of a relay")?;
    ambassador.process.rss()
}

//! Redis through the ambassador: one command, many clients, pipelines, subscriptions, a Unix socket as
//! upstream.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::{Address, Family};
use ambassador_tests::place::Place;
use ambassador_tests::pod;
use ambassador_tests::process::{Process, run};
use ambassador_tests::server::redis::Redis;
use ambassador_tests::wait::{SOON, until_true};
use ambassador_tests::way::{Road, Way};

const BENCHMARK: Duration = Duration::from_secs(60);

#[test]
fn commands_are_answered() -> Result<()> {
    let pod = pod!("redis-server", "redis-cli");
    let redis = Redis::start(&pod.upstream)?;
    for way in Way::all()? {
        let road = Road::to(&redis.address.into(), way, &pod.inside, Family::Tcp)?;
        commands(&pod.inside, &redis, &road).with_context(|| format!("by {way}"))?;
    }
    Ok(())
}

#[test]
fn commands_are_answered_by_a_unix_socket() -> Result<()> {
    let pod = pod!("redis-server", "redis-cli");
    let redis = Redis::start(&pod.inside)?;
    for way in Way::RELAYS {
        let road = Road::to(&redis.socket, way, &pod.inside, Family::Tcp)?;
        commands(&pod.inside, &redis, &road).with_context(|| format!("by {way}"))?;
    }
    Ok(())
}

/// They say nothing for a while, and then hear everything in order.
#[test]
fn subscribers_hear_what_is_published() -> Result<()> {
    const MESSAGES: usize = 1000;
    let pod = pod!("redis-server", "redis-cli");
    let redis = Redis::start(&pod.upstream)?;
    for way in Way::all()? {
        let road = Road::to(&redis.address.into(), way, &pod.inside, Family::Tcp)?;
        let ledger = redis.ledger()?;
        ledger.clear()?;
        let subscribe = || {
            let mut subscriber = cli(&pod.inside, &road.address)?;
            Process::start(subscriber.args(["--csv", "subscribe", "news"]))
        };
        let subscribers = [subscribe()?, subscribe()?];
        let all = subscribers.iter().map(Process::stdout);
        until_true("the subscriptions", || {
            Ok(all.clone().all(|heard| heard.contains(r#""subscribe","news",1"#)))
        })?;
        let publish = "for n = 1, ARGV[1] do redis.call('publish', 'news', n) end return ARGV[1]";
        let published = run(
            cli(&pod.inside, &road.address)?.args(["eval", publish, "0", &MESSAGES.to_string()]),
            SOON,
        )?;
        ensure!(published.trim() == MESSAGES.to_string(), "by {way}: published {published}");
        let last = format!(r#""message","news","{MESSAGES}""#);
        until_true("the last message", || Ok(all.clone().all(|heard| heard.contains(&last))))
            .with_context(|| format!("by {way}"))?;
        for subscriber in subscribers {
            subscriber.signal(libc::SIGTERM)?;
            let heard = subscriber.finish(SOON)?.stdout;
            let messages =
                heard.lines().filter_map(|line| line.strip_prefix(r#""message","news","#));
            let expected = (1..=MESSAGES).map(|n| format!(r#""{n}""#));
            ensure!(messages.eq(expected), "by {way}: messages are lost or out of order: {heard}");
        }
        let asked = ledger.read()?;
        road.has_carried(asked.connections, Some(asked.bytes))?;
    }
    Ok(())
}

#[test]
fn fifty_clients_are_served() -> Result<()> {
    let pod = pod!("redis-server", "redis-benchmark");
    benchmark(&pod, 20_000, 50, &[])
}

#[test]
fn pipelines_are_served() -> Result<()> {
    let pod = pod!("redis-server", "redis-benchmark");
    benchmark(&pod, 160_000, 50, &["-P", "16"])
}

#[test]
fn large_values_are_served() -> Result<()> {
    let pod = pod!("redis-server", "redis-benchmark");
    benchmark(&pod, 300, 8, &["-d", "1000000"])
}

fn commands(place: &Place, redis: &Redis, road: &Road) -> Result<()> {
    let ledger = redis.ledger()?;
    ledger.clear()?;
    let ask = |words: &[&str]| run(cli(place, &road.address)?.args(words), SOON);
    ensure!(ask(&["ping"])? == "PONG\n");
    ensure!(ask(&["set", "greeting", "hello from the pod"])? == "OK\n");
    ensure!(ask(&["get", "greeting"])? == "hello from the pod\n");
    ensure!(ask(&["append", "greeting", "!"])? == "19\n");
    ensure!(ask(&["del", "greeting"])? == "1\n");
    road.has_carried(5, Some(ledger.read()?.bytes))
}

fn cli(place: &Place, address: &Address) -> Result<std::process::Command> {
    let mut cli = place.command("redis-cli");
    cli.args(["-h", &address.host()?, "-p", &address.port()?.to_string()]);
    Ok(cli)
}

fn benchmark(pod: &pod::Pod, requests: u64, clients: u64, load: &[&str]) -> Result<()> {
    let redis = Redis::start(&pod.upstream)?;
    let ledger = redis.ledger()?;
    for way in Way::all()? {
        let road = Road::to(&redis.address.into(), way, &pod.inside, Family::Tcp)?;
        ledger.clear()?;
        let report = run(
            pod.inside
                .command("redis-benchmark")
                .args(["-h", &road.address.host()?, "-p", &road.address.port()?.to_string()])
                .args(["-t", "set,get", "--csv", "-n", &requests.to_string()])
                .args(["-c", &clients.to_string()])
                .args(load),
            BENCHMARK,
        )
        .with_context(|| format!("by {way}"))?;
        for command in ["\"SET\",", "\"GET\","] {
            ensure!(report.contains(command), "by {way}: no figures for {command}: {report}");
        }
        let asked = ledger.read()?;
        for command in ["set", "get"] {
            let calls = asked.calls(command)?;
            ensure!(calls == requests, "by {way}: {calls} times {command}, not {requests}");
        }
        road.has_carried(asked.connections, Some(asked.bytes))?;
        // Of the clients that set, and as many that get: each asks dozens of times.
        road.had_shortcuts(clients).with_context(|| format!("by {way}"))?;
    }
    Ok(())
}

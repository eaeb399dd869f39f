//! Redis through the ambassador: one command, many clients, pipelines, a Unix socket as upstream.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::Family;
use ambassador_tests::place::Place;
use ambassador_tests::pod;
use ambassador_tests::process::run;
use ambassador_tests::server::redis::Redis;
use ambassador_tests::way::{Road, Way};

const BENCHMARK: Duration = Duration::from_secs(60);

#[test]
fn commands_are_answered() -> Result<()> {
    let pod = pod!("redis-server", "redis-cli");
    let redis = Redis::start(&pod.upstream)?;
    for way in Way::for_any_client()? {
        let road = Road::to(&redis.address.into(), way, &pod.inside, Family::Tcp)?;
        commands(&pod.inside, &road).with_context(|| format!("by {way}"))?;
    }
    Ok(())
}

#[test]
fn commands_are_answered_by_a_unix_socket() -> Result<()> {
    let pod = pod!("redis-server", "redis-cli");
    let redis = Redis::start(&pod.inside)?;
    for way in Way::RELAYS {
        let road = Road::to(&redis.socket, way, &pod.inside, Family::Tcp)?;
        commands(&pod.inside, &road).with_context(|| format!("by {way}"))?;
    }
    Ok(())
}

#[test]
fn fifty_clients_are_served() -> Result<()> {
    let pod = pod!("redis-server", "redis-benchmark");
    benchmark(&pod, &["-c", "50", "-n", "20000"])
}

#[test]
fn pipelines_are_served() -> Result<()> {
    let pod = pod!("redis-server", "redis-benchmark");
    benchmark(&pod, &["-c", "50", "-P", "16", "-n", "100000"])
}

#[test]
fn large_values_are_served() -> Result<()> {
    let pod = pod!("redis-server", "redis-benchmark");
    benchmark(&pod, &["-c", "8", "-d", "1000000", "-n", "300"])
}

fn commands(place: &Place, road: &Road) -> Result<()> {
    let ask = |words: &[&str]| cli(place, road, words);
    ensure!(ask(&["ping"])? == "PONG\n");
    ensure!(ask(&["set", "greeting", "hello from the pod"])? == "OK\n");
    ensure!(ask(&["get", "greeting"])? == "hello from the pod\n");
    ensure!(ask(&["append", "greeting", "!"])? == "19\n");
    ensure!(ask(&["del", "greeting"])? == "1\n");
    Ok(())
}

fn cli(place: &Place, road: &Road, words: &[&str]) -> Result<String> {
    let port = road.address.port()?;
    run(
        place
            .command("redis-cli")
            .args(["-h", &road.address.host()?, "-p", &port.to_string()])
            .args(words),
        Duration::from_secs(20),
    )
}

fn benchmark(pod: &pod::Pod, load: &[&str]) -> Result<()> {
    let redis = Redis::start(&pod.upstream)?;
    for way in Way::for_any_client()? {
        let road = Road::to(&redis.address.into(), way, &pod.inside, Family::Tcp)?;
        let report = run(
            pod.inside
                .command("redis-benchmark")
                .args(["-h", &road.address.host()?, "-p", &road.address.port()?.to_string()])
                .args(["-t", "set,get", "--csv"])
                .args(load),
            BENCHMARK,
        )
        .with_context(|| format!("by {way}"))?;
        for command in ["\"SET\",", "\"GET\","] {
            ensure!(report.contains(command), "by {way}: no figures for {command}: {report}");
        }
    }
    Ok(())
}

//! The commands that talk to a running ambassador, wait for one, or run something beside one.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use ambassador_tests::address::Family;
use ambassador_tests::ambassador::{self, Ambassador, Launch};
use ambassador_tests::echo::Echo;
use ambassador_tests::front::{Front, ROUTE};
use ambassador_tests::place::Place;
use ambassador_tests::process::{Finished, Process};
use ambassador_tests::wait::{SOON, until_true};

const USAGE: i32 = 2;

#[test]
fn status_tells_routes_endpoints_and_connections() -> Result<()> {
    let front = Front::start(&[])?;
    let client = front.connect()?;
    let status: Value = json(front.ambassador.command(&["status", "--json"])?)?;
    ensure!(status["ready"] == true, "{status}");
    let route = &status["routes"][0];
    ensure!(route["name"] == ROUTE && route["connections"] == 1, "{status}");
    ensure!(route["listen"][0] == front.address.to_string(), "{status}");
    ensure!(route["bytes_up"] == 5 && route["bytes_down"] == 5, "{status}");
    ensure!(route["endpoints"][0]["endpoint"] == front.echo.address().to_string(), "{status}");

    let text = front.ambassador.command(&["status"])?.success()?;
    for word in [ROUTE, &front.address.to_string(), &front.echo.address().to_string()] {
        ensure!(text.contains(word), "no {word} in: {text}");
    }
    drop(client);
    Ok(())
}

#[test]
fn connections_are_listed_while_they_live() -> Result<()> {
    let front = Front::start(&[])?;
    let client = front.connect()?;
    let listed: Value = json(front.ambassador.command(&["connections", "--json"])?)?;
    let peer = client.socket().local_addr().context("ask for the client's address")?;
    let peer = peer.as_socket().context("read the client's address")?.to_string();
    ensure!(listed["peer"] == peer && listed["route"] == ROUTE, "{listed}");
    ensure!(listed["endpoint"] == front.echo.address().to_string(), "{listed}");
    ensure!(listed["bytes_up"] == 5 && listed["bytes_down"] == 5, "{listed}");
    drop(client);
    until_true("an empty list", || {
        Ok(front.ambassador.command(&["connections", "--json"])?.success()?.is_empty())
    })
}

#[test]
fn drain_can_be_ordered() -> Result<()> {
    let front = Front::start(&[])?;
    let client = front.connect()?;
    front.ambassador.command(&["drain"])?.success()?;
    front.ambassador.until_answers("/readyz", 503)?;
    client.ask(b"still carried", b"still carried")?;
    // Asking twice is no impatience, unlike a second signal.
    front.ambassador.command(&["drain"])?.success()?;
    client.ask(b"still carried", b"still carried")?;
    drop(client);
    front.ambassador.ends_with(0)
}

#[test]
fn shutdown_can_be_ordered() -> Result<()> {
    let front = Front::start(&[("--drain-deadline", "60s")])?;
    front.ambassador.command(&["shutdown"])?.success()?;
    front.ambassador.ends_with(0)
}

#[test]
fn shutdown_cuts_what_is_open() -> Result<()> {
    let front = Front::start(&[("--drain-deadline", "60s")])?;
    let client = front.connect()?;
    front.ambassador.command(&["shutdown"])?.success()?;
    client.hear_reset()?;
    front.ambassador.ends_with(1)
}

#[test]
fn the_log_level_can_be_changed() -> Result<()> {
    let front = Front::start(&[])?;
    let records = |least: usize| {
        drop(front.connect()?);
        until_true("the connection's end in the metrics", || {
            let ended = front.ambassador.metrics()?.sum("ambassador_connections_total", &[]);
            Ok(ended.is_some_and(|ended| ended >= least as f64))
        })
    };
    front.ambassador.command(&["log-level", "warn"])?.success()?;
    records(1)?;
    front.ambassador.command(&["log-level", "info"])?.success()?;
    records(2)?;
    until_true("one access record", || {
        Ok(front.ambassador.access_records("route", ROUTE)?.len() == 1)
    })?;

    let refused = front.ambassador.command(&["log-level", "loud"])?;
    ensure!(refused.code() == Some(USAGE), "{}", refused.status);
    ensure!(refused.stderr.contains("loud"), "{}", refused.stderr);
    Ok(())
}

#[test]
fn commands_without_an_ambassador_say_so() -> Result<()> {
    let nobody = tempfile::tempdir().context("create an empty directory")?;
    let control = format!("unix:{}/control.sock", nobody.path().display());
    for command in ["status", "connections", "drain", "shutdown"] {
        let finished = finish(&[command, "--control", &control])?;
        ensure!(finished.code() == Some(1), "{command}: {}", finished.status);
        ensure!(finished.stderr.lines().count() == 1, "{command}: {}", finished.stderr);
        ensure!(finished.stderr.contains(&control), "{command}: {}", finished.stderr);
    }
    Ok(())
}

#[test]
fn wait_ends_when_the_ambassador_is_ready() -> Result<()> {
    let (here, echo) = (Place::here(), Echo::new(Family::Tcp)?);
    let launch = Launch::new(&here)?.route(format!("{}={}", here.port()?, echo.address()));
    let admin = launch.admin().to_string();
    let mut waiting = Process::start(ambassador::command(&here)?.args([
        "wait",
        "--ready",
        "--timeout",
        "20s",
        "--admin-http",
        &admin,
    ]))?;
    ensure!(waiting.ended()?.is_none(), "it did not wait: {}", waiting.stderr());
    let _ambassador = launch.spawn()?;
    waiting.finish(SOON)?.success().map(drop)
}

#[test]
fn wait_gives_up_in_time() -> Result<()> {
    let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, Place::here().port()?)).to_string();
    let finished = finish(&["wait", "--ready", "--timeout", "300ms", "--admin-http", &admin])?;
    ensure!(finished.code() == Some(1), "{}", finished.status);
    ensure!(finished.stderr.contains(&admin), "{}", finished.stderr);
    Ok(())
}

#[test]
fn exec_passes_the_exit_code_on_and_drains() -> Result<()> {
    let front = Front::start(&[])?;
    let binary = ambassador::binary()?.to_str().context("read the binary's path")?;
    let script = format!("'{binary}' probe tcp {} && exit 7", front.address);
    let finished = exec(&front.ambassador, &["sh", "-c", &script])?;
    ensure!(finished.code() == Some(7), "{}: {}", finished.status, finished.stderr);
    front.ambassador.ends_with(0)
}

#[test]
fn exec_hands_its_environment_on_as_it_is() -> Result<()> {
    const NAME: &str = "RUST_LIB_BACKTRACE";
    let front = Front::start(&[])?;
    let ours = std::env::var(NAME).unwrap_or_else(|_| "unset".into());
    let script = format!("test \"${{{NAME}-unset}}\" = '{ours}'");
    let finished = exec(&front.ambassador, &["sh", "-c", &script])?;
    ensure!(finished.code() == Some(0), "{}: {}", finished.status, finished.stderr);
    front.ambassador.ends_with(0)
}

#[test]
fn exec_passes_a_signal_on_as_shells_do() -> Result<()> {
    let front = Front::start(&[])?;
    let finished = exec(&front.ambassador, &["sh", "-c", "kill -9 $$"])?;
    ensure!(finished.code() == Some(128 + 9), "{}", finished.status);
    front.ambassador.ends_with(0)
}

#[test]
fn exec_drains_even_if_the_command_cannot_start() -> Result<()> {
    let front = Front::start(&[])?;
    let finished = exec(&front.ambassador, &["/no/such/program"])?;
    ensure!(finished.code().is_some_and(|code| code != 0), "{}", finished.status);
    ensure!(finished.stderr.contains("/no/such/program"), "{}", finished.stderr);
    front.ambassador.ends_with(0)
}

#[test]
fn probe_tells_who_listens() -> Result<()> {
    for family in [Family::Tcp, Family::Unix] {
        let echo = Echo::new(family)?;
        let address = echo.address().to_string();
        finish(&["probe", "tcp", &address])?.success()?;
        drop(echo);
        let finished = finish(&["probe", "tcp", &address])?;
        ensure!(finished.code() == Some(1), "{address}: {}", finished.status);
        ensure!(finished.stderr.contains(&address), "{}", finished.stderr);
    }
    Ok(())
}

fn finish(words: &[&str]) -> Result<Finished> {
    Process::start(ambassador::command(&Place::here())?.args(words))?.finish(SOON)
}

fn exec(ambassador: &Ambassador, words: &[&str]) -> Result<Finished> {
    let control = format!("unix:{}", ambassador.control().display());
    let admin = ambassador.admin.to_string();
    let mut all = vec!["exec", "--control", &control, "--admin-http", &admin, "--"];
    all.extend(words);
    finish(&all)
}

fn json(finished: Finished) -> Result<Value> {
    let text = finished.success()?;
    serde_json::from_str(&text).with_context(|| format!("parse {text:?}"))
}

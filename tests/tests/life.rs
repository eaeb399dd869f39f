//! From start to end: readiness, draining, signals, exit codes, and the commands that talk to a running
//! ambassador.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador::{self, Ambassador, Launch};
use ambassador_tests::echo::Echo;
use ambassador_tests::peer::Peer;
use ambassador_tests::place::Place;
use ambassador_tests::process::{Finished, Process};
use ambassador_tests::wait::{SOON, until, until_true};
use ambassador_tests::way::{Way, Wire};

#[test]
fn drain_finishes_what_is_open_and_ends_well() -> Result<()> {
    let (ambassador, address, _echo) = serving(&[])?;
    let client = connected(&address)?;
    ambassador.process.signal(libc::SIGTERM)?;
    refuses(&address)?;
    client.ask(b"still carried", b"still carried")?;
    client.finish()?;
    client.hear_end()?;
    ends_with(ambassador, 0).map(drop)
}

#[test]
fn drain_goes_on_accepting_for_its_grace() -> Result<()> {
    let (ambassador, address, _echo) = serving(&["--drain-grace", "2s"])?;
    ambassador.process.signal(libc::SIGTERM)?;
    answers_with(&ambassador, "/readyz", 503)?;
    let late = connected(&address).context("connect during the grace")?;
    refuses(&address)?;
    late.ask(b"still carried", b"still carried")?;
    drop(late);
    ends_with(ambassador, 0).map(drop)
}

#[test]
fn drain_cuts_what_is_left_at_its_deadline() -> Result<()> {
    let (ambassador, address, _echo) = serving(&["--drain-deadline", "500ms"])?;
    let client = connected(&address)?;
    let started = Instant::now();
    ambassador.process.signal(libc::SIGTERM)?;
    client.hear_reset().context("the connection that is cut")?;
    ends_with(ambassador, 1)?;
    ensure!(started.elapsed() >= Duration::from_millis(500), "cut before the deadline");
    Ok(())
}

#[test]
fn a_second_signal_ends_at_once() -> Result<()> {
    let (ambassador, address, _echo) = serving(&["--drain-deadline", "60s"])?;
    let client = connected(&address)?;
    ambassador.process.signal(libc::SIGTERM)?;
    answers_with(&ambassador, "/readyz", 503)?;
    ambassador.process.signal(libc::SIGTERM)?;
    ends_with(ambassador, 1)?;
    client.hear_reset()
}

#[test]
fn probes_and_metrics_answer_while_draining() -> Result<()> {
    let (ambassador, address, _echo) = serving(&[])?;
    for path in ["/startupz", "/livez", "/readyz", "/healthz", "/metrics"] {
        answers_with(&ambassador, path, 200)?;
    }
    let client = connected(&address)?;
    ambassador.process.signal(libc::SIGTERM)?;
    answers_with(&ambassador, "/readyz", 503)?;
    for (path, status) in [("/startupz", 200), ("/livez", 200), ("/metrics", 200)] {
        let answer = ambassador.get(path)?;
        ensure!(answer.status == status, "{path} answers {} while draining", answer.status);
    }
    ensure!(ambassador.metrics()?.sum("ambassador_connections_active", &[]) == Some(1.0));
    drop(client);
    ends_with(ambassador, 0).map(drop)
}

#[test]
fn an_idle_ambassador_ends_at_once() -> Result<()> {
    let (ambassador, _address, _echo) = serving(&["--drain-deadline", "60s"])?;
    let started = Instant::now();
    ambassador.end()?;
    ensure!(started.elapsed() < Duration::from_secs(5), "it took {:?}", started.elapsed());
    Ok(())
}

#[test]
fn verbose_probes_name_the_routes() -> Result<()> {
    let (ambassador, _address, _echo) = serving(&[])?;
    let answer = ambassador.get("/readyz?verbose")?;
    ensure!(answer.body.contains("life"), "no route in: {}", answer.body);
    Ok(())
}

#[test]
fn exit_codes_tell_usage_from_a_missing_tier() -> Result<()> {
    let (usage, missing) = (2, 77);
    for words in [&["run", "--no-such-flag"][..], &["no-such-command"], &[], &["exec"]] {
        let finished = finish(words)?;
        ensure!(finished.code() == Some(usage), "{words:?}: {}", finished.status);
    }
    let version = finish(&["version"])?.success()?;
    if version.contains("no kernel tiers") {
        let finished = finish(&["run", "--route", "15432=db.test:5432", "--require", "direct"])?;
        ensure!(finished.code() == Some(missing), "{}: {}", finished.status, finished.stderr);
        ensure!(finished.stderr.contains("direct"), "it names no tier: {}", finished.stderr);
    }
    Ok(())
}

#[test]
fn status_tells_routes_endpoints_and_connections() -> Result<()> {
    let (ambassador, address, echo) = serving(&[])?;
    let client = connected(&address)?;
    let status: Value = json(ambassador.command(&["status", "--json"])?)?;
    ensure!(status["ready"] == true, "{status}");
    let route = &status["routes"][0];
    ensure!(route["name"] == "life" && route["connections"] == 1, "{status}");
    ensure!(route["listen"][0] == address.to_string(), "{status}");
    ensure!(route["bytes_up"] == 5 && route["bytes_down"] == 5, "{status}");
    ensure!(route["endpoints"][0]["endpoint"] == echo.address().to_string(), "{status}");

    let text = ambassador.command(&["status"])?.success()?;
    for word in ["life", &address.to_string(), &echo.address().to_string()] {
        ensure!(text.contains(word), "no {word} in: {text}");
    }
    drop(client);
    Ok(())
}

#[test]
fn connections_are_listed_while_they_live() -> Result<()> {
    let (ambassador, address, echo) = serving(&[])?;
    let client = connected(&address)?;
    let listed: Value = json(ambassador.command(&["connections", "--json"])?)?;
    let peer = client.socket().local_addr().context("ask for the client's address")?;
    let peer = peer.as_socket().context("read the client's address")?.to_string();
    ensure!(listed["peer"] == peer && listed["route"] == "life", "{listed}");
    ensure!(listed["endpoint"] == echo.address().to_string(), "{listed}");
    ensure!(listed["bytes_up"] == 5 && listed["bytes_down"] == 5, "{listed}");
    drop(client);
    until_true("an empty list", || {
        Ok(ambassador.command(&["connections", "--json"])?.success()?.is_empty())
    })
}

#[test]
fn drain_can_be_ordered() -> Result<()> {
    let (ambassador, address, _echo) = serving(&[])?;
    let client = connected(&address)?;
    ambassador.command(&["drain"])?.success()?;
    answers_with(&ambassador, "/readyz", 503)?;
    client.ask(b"still carried", b"still carried")?;
    // Asking twice is no impatience, unlike a second signal.
    ambassador.command(&["drain"])?.success()?;
    client.ask(b"still carried", b"still carried")?;
    drop(client);
    ends_with(ambassador, 0).map(drop)
}

#[test]
fn shutdown_can_be_ordered() -> Result<()> {
    let (ambassador, _address, _echo) = serving(&["--drain-deadline", "60s"])?;
    ambassador.command(&["shutdown"])?.success()?;
    ends_with(ambassador, 0).map(drop)
}

#[test]
fn the_log_level_can_be_changed() -> Result<()> {
    let (ambassador, address, _echo) = serving(&[])?;
    let records = |least: usize| {
        drop(connected(&address)?);
        until_true("the connection's end in the metrics", || {
            let ended = ambassador.metrics()?.sum("ambassador_connections_total", &[]);
            Ok(ended.is_some_and(|ended| ended >= least as f64))
        })
    };
    ambassador.command(&["log-level", "warn"])?.success()?;
    records(1)?;
    ambassador.command(&["log-level", "info"])?.success()?;
    records(2)?;
    until_true("one access record", || Ok(ambassador.access_records("route", "life")?.len() == 1))?;

    let refused = ambassador.command(&["log-level", "loud"])?;
    ensure!(refused.code() == Some(2), "{}", refused.status);
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
    let (ambassador, address, _echo) = serving(&[])?;
    let binary = ambassador::binary()?.to_str().context("read the binary's path")?;
    let script = format!("'{binary}' probe tcp {address} && exit 7");
    let finished = exec(&ambassador, &["sh", "-c", &script])?;
    ensure!(finished.code() == Some(7), "{}: {}", finished.status, finished.stderr);
    ends_with(ambassador, 0).map(drop)
}

#[test]
fn exec_passes_a_signal_on_as_shells_do() -> Result<()> {
    let (ambassador, _address, _echo) = serving(&[])?;
    let finished = exec(&ambassador, &["sh", "-c", "kill -9 $$"])?;
    ensure!(finished.code() == Some(128 + 9), "{}", finished.status);
    ends_with(ambassador, 0).map(drop)
}

#[test]
fn exec_drains_even_if_the_command_cannot_start() -> Result<()> {
    let (ambassador, _address, _echo) = serving(&[])?;
    let finished = exec(&ambassador, &["/no/such/program"])?;
    ensure!(finished.code().is_some_and(|code| code != 0), "{}", finished.status);
    ensure!(finished.stderr.contains("/no/such/program"), "{}", finished.stderr);
    ends_with(ambassador, 0).map(drop)
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

#[test]
fn every_connection_leaves_one_access_record() -> Result<()> {
    for way in Way::RELAYS {
        let wire = Wire::new(way, Family::Tcp)?;
        let ambassador = wire.road.ambassador.as_ref().context("find the ambassador")?;
        let (client, server) = wire.pair()?;
        client.say(&[b'u'; 1000])?;
        server.hear(1000)?;
        server.say(&[b'd'; 300_000])?;
        drop(server);
        ensure!(client.hear_to_end()?.len() == 300_000);
        drop(client);

        let (client, server) = wire.pair()?;
        client.say(b"and gone")?;
        server.hear(8)?;
        client.reset()?;
        server.hear_reset()?;

        let expected = [("ok", 1000, 300_000), ("client_reset", 8, 0)];
        for (outcome, up, down) in expected {
            let records = until("an access record", SOON, || {
                let records = ambassador.access_records("outcome", outcome)?;
                Ok((!records.is_empty()).then_some(records))
            })?;
            ensure!(records.len() == 1, "by {way}: {records:?}");
            let record = &records[0];
            ensure!(record["bytes_up"] == up && record["bytes_down"] == down, "{record}");
            ensure!(record["route"] == "road" && record["tier"] == way.to_string(), "{record}");
            ensure!(record["endpoint"] == wire.listener.address().to_string(), "{record}");
        }
        ensure!(ambassador.access_records("route", "road")?.len() == 2);

        let metrics = ambassador.metrics()?;
        let bytes = |direction| {
            metrics.sum("ambassador_bytes_total", &[("route", "road"), ("direction", direction)])
        };
        ensure!(bytes("up") == Some(1008.0) && bytes("down") == Some(300_000.0));
        ensure!(metrics.sum("ambassador_connections_active", &[]) == Some(0.0));
    }
    Ok(())
}

#[test]
fn logs_for_people_are_text() -> Result<()> {
    let (here, echo) = (Place::here(), Echo::new(Family::Tcp)?);
    let mut process = Process::start(
        ambassador::command(&here)?
            .args(["run", "--control", "off", "--admin-http", "off"])
            .args(["--route", &format!("{}={}", here.port()?, echo.address())]),
    )?;
    until_true("the line that says it is ready", || {
        process.still_runs()?;
        Ok(process.stderr().lines().any(|line| line.contains("ready") && !line.contains('{')))
    })?;
    process.signal(libc::SIGTERM)?;
    let finished = process.finish(SOON)?;
    ensure!(finished.code() == Some(0), "{}: {}", finished.status, finished.stderr);
    Ok(())
}

#[test]
fn idle_connections_end_when_that_is_asked_for() -> Result<()> {
    let (here, echo) = (Place::here(), Echo::new(Family::Tcp)?);
    let address = Address::from(SocketAddr::from((Ipv4Addr::LOCALHOST, here.port()?)));
    let config = format!(
        "version: 1
routes: [{{ name: idle, listen: '{address}', upstream: echo, idle_timeout: 300ms }}]
upstreams: {{ echo: {{ endpoints: ['{}'] }} }}
",
        echo.address()
    );
    let ambassador = Launch::new(&here)?.config(&config)?.start()?;
    let client = connected(&address)?;
    client.hear_close()?;
    until_true("its access record", || {
        Ok(ambassador.access_records("outcome", "idle_timeout")?.len() == 1)
    })
}

/// An ambassador with the route `life` to an echo, and more flags.
fn serving(flags: &[&str]) -> Result<(Ambassador, Address, Echo)> {
    let (here, echo) = (Place::here(), Echo::new(Family::Tcp)?);
    let address = Address::from(SocketAddr::from((Ipv4Addr::LOCALHOST, here.port()?)));
    let launch = Launch::new(&here)?.route(format!("life:{address}={}", echo.address()));
    let launch = flags.chunks_exact(2).fold(launch, |launch, flag| launch.flag(flag[0], flag[1]));
    Ok((launch.start()?, address, echo))
}

/// A connection that has carried five bytes each way.
fn connected(address: &Address) -> Result<Peer> {
    let client = address.connect()?;
    client.ask(b"hello", b"hello")?;
    Ok(client)
}

fn refuses(address: &Address) -> Result<()> {
    until_true("the end of accepting", || Ok(address.connect().is_err()))
}

fn answers_with(ambassador: &Ambassador, path: &str, status: u16) -> Result<()> {
    until_true(&format!("{path} to answer {status}"), || Ok(ambassador.get(path)?.status == status))
}

fn ends_with(ambassador: Ambassador, code: i32) -> Result<Finished> {
    let finished = ambassador.process.finish(SOON)?;
    ensure!(
        finished.code() == Some(code),
        "it ended with {} and not {code}: {}",
        finished.status,
        finished.stderr
    );
    Ok(finished)
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

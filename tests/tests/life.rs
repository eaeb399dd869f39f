//! From start to end: probes, draining, signals, exit codes, logs and access records.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador::{self, Launch};
use ambassador_tests::echo::Echo;
use ambassador_tests::front::{Front, ROUTE};
use ambassador_tests::place::Place;
use ambassador_tests::process::{Finished, Process};
use ambassador_tests::wait::{SOON, until, until_true};
use ambassador_tests::way::{Way, Wire};

const USAGE: i32 = 2;
const TIER_MISSING: i32 = 77;

#[test]
fn a_start_without_the_kernel_tiers_says_why() -> Result<()> {
    let front = Front::start(&[("--cgroup", "/nowhere")])?;
    let told = "the kernel tiers are not used: ";
    let log = front.ambassador.log()?;
    let said = log.iter().filter_map(|line| line["message"].as_str()?.strip_prefix(told));
    ensure!(said.count() == 1, "{log:#?}");
    Ok(())
}

#[test]
fn drain_finishes_what_is_open_and_ends_well() -> Result<()> {
    let front = Front::start(&[])?;
    let client = front.connect()?;
    front.ambassador.process.signal(libc::SIGTERM)?;
    refuses(&front)?;
    client.ask(b"still carried", b"still carried")?;
    client.finish()?;
    client.hear_end()?;
    front.ambassador.ends_with(0)
}

#[test]
fn drain_goes_on_accepting_for_its_grace() -> Result<()> {
    let front = Front::start(&[("--drain-grace", "2s")])?;
    front.ambassador.process.signal(libc::SIGTERM)?;
    front.ambassador.until_answers("/readyz", 503)?;
    let late = front.connect().context("connect during the grace")?;
    refuses(&front)?;
    late.ask(b"still carried", b"still carried")?;
    drop(late);
    front.ambassador.ends_with(0)
}

#[test]
fn drain_cuts_what_is_left_at_its_deadline() -> Result<()> {
    let front = Front::start(&[("--drain-deadline", "500ms")])?;
    let client = front.connect()?;
    let started = Instant::now();
    front.ambassador.process.signal(libc::SIGTERM)?;
    client.hear_reset().context("the connection that is cut")?;
    front.ambassador.ends_with(1)?;
    ensure!(started.elapsed() >= Duration::from_millis(500), "cut before the deadline");
    Ok(())
}

#[test]
fn a_second_signal_ends_at_once() -> Result<()> {
    let front = Front::start(&[("--drain-deadline", "60s")])?;
    let client = front.connect()?;
    front.ambassador.process.signal(libc::SIGTERM)?;
    front.ambassador.until_answers("/readyz", 503)?;
    front.ambassador.process.signal(libc::SIGTERM)?;
    front.ambassador.ends_with(1)?;
    client.hear_reset()
}

/// It has descriptors of its own, and not the one by which whoever takes a signal wakes the rest.
#[test]
fn the_thread_of_the_log_leaves_signals_to_others() -> Result<()> {
    let front = Front::start(&[])?;
    let threads = format!("/proc/{}/task", front.ambassador.process.id());
    let ours = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP].map(|signal| 1_u64 << (signal - 1));
    let ours: u64 = ours.iter().sum();
    until_true("a thread of the log that takes no signal", || {
        for thread in std::fs::read_dir(&threads).context("list threads")? {
            // One that ends meanwhile is not the one.
            let status = std::fs::read_to_string(thread?.path().join("status")).unwrap_or_default();
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
            if field("Name:\t") == Some("log") {
                let blocked = field("SigBlk:\t").context("find what it blocks")?;
                return Ok(u64::from_str_radix(blocked, 16)? & ours == ours);
            }
        }
        Ok(false)
    })
}

#[test]
fn probes_and_metrics_answer_while_draining() -> Result<()> {
    let front = Front::start(&[])?;
    for path in ["/startupz", "/livez", "/readyz", "/healthz", "/metrics"] {
        front.ambassador.until_answers(path, 200)?;
    }
    let client = front.connect()?;
    front.ambassador.process.signal(libc::SIGTERM)?;
    front.ambassador.until_answers("/readyz", 503)?;
    for (path, status) in [("/startupz", 200), ("/livez", 200), ("/metrics", 200)] {
        let answer = front.ambassador.get(path)?;
        ensure!(answer.status == status, "{path} answers {} while draining", answer.status);
    }
    ensure!(front.ambassador.metrics()?.sum("ambassador_connections_active", &[]) == Some(1.0));
    drop(client);
    front.ambassador.ends_with(0)
}

#[test]
fn an_idle_ambassador_ends_at_once() -> Result<()> {
    let front = Front::start(&[("--drain-deadline", "60s")])?;
    let started = Instant::now();
    front.ambassador.end()?;
    ensure!(started.elapsed() < Duration::from_secs(5), "it took {:?}", started.elapsed());
    Ok(())
}

#[test]
fn verbose_probes_name_the_routes() -> Result<()> {
    let front = Front::start(&[])?;
    let answer = front.ambassador.get("/readyz?verbose")?;
    ensure!(answer.body.contains(ROUTE), "no route in: {}", answer.body);
    Ok(())
}

#[test]
fn exit_codes_tell_usage_from_a_missing_tier() -> Result<()> {
    for words in [&["run", "--no-such-flag"][..], &["no-such-command"], &[], &["exec"]] {
        let finished = finish(words)?;
        ensure!(finished.code() == Some(USAGE), "{words:?}: {}", finished.status);
    }
    let version = finish(&["version"])?.success()?;
    if version.contains("no kernel tiers") {
        let finished = finish(&["run", "--route", "15432=db.test:5432", "--require", "direct"])?;
        ensure!(finished.code() == Some(TIER_MISSING), "{}: {}", finished.status, finished.stderr);
        ensure!(finished.stderr.contains("direct"), "it names no tier: {}", finished.stderr);
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
    let client = address.connect()?;
    client.ask(b"hello", b"hello")?;
    client.hear_close()?;
    until_true("its access record", || {
        Ok(ambassador.access_records("outcome", "idle_timeout")?.len() == 1)
    })
}

fn refuses(front: &Front) -> Result<()> {
    until_true("the end of accepting", || Ok(front.address.connect().is_err()))
}

fn finish(words: &[&str]) -> Result<Finished> {
    Process::start(ambassador::command(&Place::here())?.args(words))?.finish(SOON)
}

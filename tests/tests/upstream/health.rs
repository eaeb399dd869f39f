//! Endpoints that are asked whether they work: what is down gets no connections, and may lose those it has; on
//! every way.

use std::time::Duration;

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::{Ambassador, Launch};
use ambassador_tests::installed;
use ambassador_tests::place::Place;
use ambassador_tests::server::redis::Redis;
use ambassador_tests::wait::until_true;
use ambassador_tests::way::Way;
use anyhow::{Context, Result, ensure};

use crate::balanced_with;
use crate::ejection::{endpoints_of, until_is};

/// What is accepted by the kernel of a server that has stopped is ejected by nobody: only asking tells.
const CHECKED: &str = "eject: none
    health: { check: redis, interval: 100ms, timeout: 200ms, fall: 2, rise: 2 }";

#[test]
fn what_accepts_but_does_not_answer_gets_no_connections_until_it_does() -> Result<()> {
    installed!("redis-server");
    for way in Way::proxied()? {
        let [first, second] = two_servers()?;
        let (ambassador, route) = behind(way, [&first, &second], CHECKED)?;
        ensure!(answering(&route)? == first.address.port(), "{way}");
        first.process.signal(libc::SIGSTOP)?;
        until_is(&ambassador, &first.address.into(), false).with_context(|| format!("{way}"))?;
        for _ in 0..5 {
            ensure!(answering(&route)? == second.address.port(), "{way}");
        }
        let told = endpoints_of(&ambassador)?[0]["hosts"][0]["health"].to_string();
        ensure!(told.contains("down: no answer within 200ms"), "{way}: {told}");
        first.process.signal(libc::SIGCONT)?;
        until_is(&ambassador, &first.address.into(), true).with_context(|| format!("{way}"))?;
        until_true("a return", || Ok(answering(&route)? == first.address.port()))?;
    }
    Ok(())
}

#[test]
fn what_has_the_wrong_role_gets_no_connections() -> Result<()> {
    installed!("redis-server");
    let here = Place::here();
    let master = Redis::start(&here)?;
    let port = master.address.port().to_string();
    let replica = Redis::start_with(&here, &["--replicaof", "127.0.0.1", &port])?;
    let more = "health: { check: { redis: { role: master } }, interval: 100ms }";
    for way in by_whom()? {
        let (ambassador, route) = behind(way, [&replica, &master], more)?;
        until_is(&ambassador, &replica.address.into(), false).with_context(|| format!("{way}"))?;
        ensure!(answering(&route)? == master.address.port(), "{way}");
    }
    Ok(())
}

#[test]
fn connections_to_what_is_down_are_closed_where_that_is_wanted() -> Result<()> {
    installed!("redis-server");
    for way in Way::proxied()? {
        let [first, second] = two_servers()?;
        let more = format!("{CHECKED}\n    on_unhealthy: close");
        let (ambassador, route) = behind(way, [&first, &second], &more)?;
        let app = route.connect()?;
        // A shortcut is opened for what goes on.
        for _ in 0..3 {
            app.ask(b"PING\r\n", b"+PONG\r\n")?;
        }
        let told = ambassador.connections()?;
        ensure!(told[0]["tier"] == way.to_string(), "{way}: {told:?}");
        first.process.signal(libc::SIGSTOP)?;
        let error = app.notice_failure().with_context(|| format!("{way}"))?;
        let expected = [libc::ECONNRESET, libc::ECONNABORTED];
        ensure!(error.raw_os_error().is_some_and(|it| expected.contains(&it)), "{way}: {error}");
        ensure!(answering(&route)? == second.address.port(), "{way}");
        until_true("the record", || {
            Ok(!ambassador.access_records("outcome", "host_lost")?.is_empty())
        })
        .with_context(|| format!("{way}"))?;
        first.process.signal(libc::SIGCONT)?;
    }
    Ok(())
}

#[test]
fn connections_to_what_is_down_stay_by_default() -> Result<()> {
    installed!("redis-server");
    for way in by_whom()? {
        let [first, second] = two_servers()?;
        let (ambassador, route) = behind(way, [&first, &second], CHECKED)?;
        let app = route.connect()?;
        app.ask(b"PING\r\n", b"+PONG\r\n")?;
        first.process.signal(libc::SIGSTOP)?;
        until_is(&ambassador, &first.address.into(), false).with_context(|| format!("{way}"))?;
        first.process.signal(libc::SIGCONT)?;
        app.ask(b"PING\r\n", b"+PONG\r\n").with_context(|| format!("{way}"))?;
    }
    Ok(())
}

#[test]
fn while_nothing_is_healthy_connections_fail_at_once() -> Result<()> {
    installed!("redis-server");
    for way in by_whom()? {
        let [first, second] = two_servers()?;
        let (ambassador, route) = behind(way, [&first, &second], CHECKED)?;
        for redis in [&first, &second] {
            redis.process.signal(libc::SIGSTOP)?;
            until_is(&ambassador, &redis.address.into(), false)
                .with_context(|| format!("{way}"))?;
        }
        route.connect()?.hear_close().with_context(|| format!("{way}"))?;
        let log = ambassador.process.stderr();
        ensure!(log.contains("down: no answer within 200ms"), "{way}: {log}");
        second.process.signal(libc::SIGCONT)?;
        until_is(&ambassador, &second.address.into(), true).with_context(|| format!("{way}"))?;
        ensure!(answering(&route)? == second.address.port(), "{way}");
        first.process.signal(libc::SIGCONT)?;
    }
    Ok(())
}

#[test]
fn readiness_counts_what_is_healthy_only_where_it_is_told_to() -> Result<()> {
    installed!("redis-server");
    let here = Place::here();
    let [one, two] = two_servers()?;
    let routes = |admin: &str| -> Result<String> {
        let mut text = format!("version: 1\n{admin}\nroutes:\n");
        for name in ["one", "two"] {
            text += &format!("  - {{ listen: '127.0.0.1:{}', upstream: {name} }}\n", here.port()?);
        }
        text += "upstreams:\n";
        for (name, redis) in [("one", &one), ("two", &two)] {
            text += &format!("  {name}:\n    endpoints: '{}'\n    {CHECKED}\n", redis.address);
        }
        Ok(text)
    };
    one.process.signal(libc::SIGSTOP)?;
    let by_default = Launch::new(&here)?.config(&routes("")?)?.start()?;
    let text = routes("admin: { ready_when: healthy }")?;
    let counting = Launch::new(&here)?.config(&text)?.spawn()?;
    let lacks = |name: &str| {
        until_true(&format!("{name} to be what is missing"), || {
            let Ok(answer) = counting.get("/readyz") else { return Ok(false) };
            ensure!(answer.status == 503, "ready, while {name} is down");
            Ok(answer.body == format!("not ready: no healthy endpoint for {name}\n"))
        })
    };
    lacks("one")?;
    one.process.signal(libc::SIGCONT)?;
    counting.until_answers("/readyz", 200)?;
    ensure!(counting.status()?["ready"] == true);
    two.process.signal(libc::SIGSTOP)?;
    counting.until_answers("/readyz", 503)?;
    lacks("two")?;
    counting.until_answers("/livez", 200)?;
    counting.until_answers("/startupz", 200)?;
    ensure!(counting.command(&["status"])?.success()?.contains("serving, but not ready"));

    until_true("a check that fails", || {
        Ok(by_default.status()?["routes"][1]["endpoints"][0]["healthy"] == false)
    })?;
    by_default.until_answers("/readyz", 200)?;
    let told = counting.reconfigure(&text.replace("healthy", "bound"))?.success()?;
    ensure!(told.contains("admin.ready_when"), "it says {told}");
    lacks("two")?;
    two.process.signal(libc::SIGCONT)
}

/// One way on which user space decides, and the one on which the kernel does.
pub(crate) fn by_whom() -> Result<Vec<Way>> {
    let decided = |way: &Way| matches!(way, Way::Splice | Way::Direct);
    Ok(Way::proxied()?.into_iter().filter(decided).collect())
}

fn two_servers() -> Result<[Redis; 2]> {
    let here = Place::here();
    Ok([Redis::start(&here)?, Redis::start(&here)?])
}

fn behind(way: Way, servers: [&Redis; 2], more: &str) -> Result<(Ambassador, Address)> {
    let servers = servers.map(|redis| Address::from(redis.address));
    balanced_with(way, "failover", &[(&servers[0], 1), (&servers[1], 1)], more)
}

/// The port of whoever answers.
fn answering(route: &Address) -> Result<u16> {
    let app = route.connect()?;
    let _ = app.socket().set_read_timeout(Some(Duration::from_secs(2)));
    app.say(b"CONFIG GET port\r\n")?;
    let head = app.hear(b"*2\r\n$4\r\nport\r\n$5\r\n".len())?;
    ensure!(head.ends_with(b"$5\r\n"), "it said {}", head.escape_ascii());
    String::from_utf8(app.hear(5)?)?.parse().context("read a port")
}

//! Each kind of check against a real server that passes it, fails it and comes back; what becomes of the share of
//! one that is back, and of the checks of a route that is gone. Where user space decides and where the kernel does.

use std::thread::scope;
use std::time::{Duration, Instant};

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador::{Ambassador, Launch};
use ambassador_tests::echo::Echo;
use ambassador_tests::installed;
use ambassador_tests::peer::Listener;
use ambassador_tests::place::Place;
use ambassador_tests::process::run;
use ambassador_tests::server::mariadb::Mariadb;
use ambassador_tests::server::nginx::Nginx;
use ambassador_tests::server::postgres::{Kind, Postgres};
use ambassador_tests::wait::{SOON, until, until_true};
use ambassador_tests::way::Way;
use anyhow::{Context, Result, anyhow, ensure};

use crate::ejection::{endpoints_of, until_is};
use crate::health::by_whom;
use crate::{balanced_with, dead, hold, tally};

#[test]
fn one_that_is_back_begins_with_little_and_gets_its_share_in_the_end() -> Result<()> {
    for way in by_whom()? {
        let (one, two) = (Echo::greeting("1")?, Echo::greeting("2")?);
        let address = one.address().clone();
        let more = "eject: none
    health: { check: tcp, interval: 100ms, timeout: 500ms, fall: 2, rise: 2, slow_start: 8s }";
        let endpoints = [(&address, 1), (two.address(), 1)];
        let (ambassador, route) = balanced_with(way, "round_robin", &endpoints, more)?;
        let shares = || -> Result<(usize, usize)> {
            let held = hold(&route, 30)?;
            let reached = tally(&held);
            let count = |name| reached.get(name).copied().unwrap_or(0);
            Ok((count("1"), count("2")))
        };
        // None of them is back from anywhere.
        ensure!(shares()? == (15, 15), "{way}");
        drop(one);
        until_is(&ambassador, &address, false).with_context(|| format!("{way}"))?;
        let _back = Echo::on(address.listen()?, "1");
        until_is(&ambassador, &address, true).with_context(|| format!("{way}"))?;
        let (first, _) = shares()?;
        ensure!(first <= 10, "{way}: {first} of 30 at once");
        until_true("some connections", || Ok(shares()?.0 > 0)).with_context(|| format!("{way}"))?;
        until_true("its whole share", || Ok(shares()? == (15, 15)))
            .with_context(|| format!("{way}"))?;
    }
    Ok(())
}

#[test]
fn mysql_is_up_while_it_greets() -> Result<()> {
    installed!("mariadb-install-db", "mariadbd");
    let mariadb = Mariadb::start(&Place::here())?;
    let address = Address::from(mariadb.address);
    // It accepts, and waits to be spoken to.
    let silent = Echo::greeting("")?;
    let more = checked("mysql");
    for way in by_whom()? {
        let endpoints = [(silent.address(), 1), (&address, 1)];
        let (ambassador, route) = balanced_with(way, "failover", &endpoints, &more)?;
        until_is(&ambassador, silent.address(), false).with_context(|| format!("{way}"))?;
        let greets = || -> Result<bool> { Ok(route.connect()?.hear(5)?[4] == 10) };
        ensure!(greets()?, "{way}");
        mariadb.process.signal(libc::SIGSTOP)?;
        until_is(&ambassador, &address, false).with_context(|| format!("{way}"))?;
        mariadb.process.signal(libc::SIGCONT)?;
        until_is(&ambassador, &address, true).with_context(|| format!("{way}"))?;
        until_true("a return", greets).with_context(|| format!("{way}"))?;
    }
    Ok(())
}

#[test]
fn http_is_up_while_its_status_is_the_expected_one() -> Result<()> {
    installed!("nginx");
    let here = Place::here();
    let [other, first, second] = [dead()?, dead()?, dead()?];
    let configuration = format!(
        "events {{}} http {{ access_log off;
            server {{ listen {other}; location / {{ return 200 other; }} }}
            server {{
                listen {first};
                location /health {{ if (-f DIRECTORY/ill) {{ return 503; }} return 204; }}
                location / {{ return 200 first; }}
            }}
            server {{
                listen {second};
                location /health {{ return 204; }}
                location / {{ return 200 second; }}
            }}
        }}"
    );
    let nginx = Nginx::start(&here, &configuration, &second)?;
    let ill = nginx.directory().join("ill");
    let more = checked("{ http: { path: /health, status: 204 } }");
    for way in by_whom()? {
        let endpoints = [(&other, 1), (&first, 1), (&second, 1)];
        let (ambassador, route) = balanced_with(way, "failover", &endpoints, &more)?;
        let serves = |name: &str| -> Result<bool> {
            let app = route.connect()?;
            app.say(b"GET / HTTP/1.0\r\n\r\n")?;
            Ok(app.hear_to_end()?.ends_with(name.as_bytes()))
        };
        until_is(&ambassador, &other, false).with_context(|| format!("{way}"))?;
        until_true("the first", || serves("first")).with_context(|| format!("{way}"))?;
        std::fs::write(&ill, "").context("make the first one ill")?;
        until_is(&ambassador, &first, false).with_context(|| format!("{way}"))?;
        let told = endpoints_of(&ambassador)?[1]["hosts"][0]["health"].to_string();
        ensure!(told.contains("status 503, expected 204"), "{way}: {told}");
        until_true("the second", || serves("second")).with_context(|| format!("{way}"))?;
        std::fs::remove_file(&ill).context("cure the first one")?;
        until_true("a return", || serves("first")).with_context(|| format!("{way}"))?;
    }
    Ok(())
}

#[test]
fn failover_follows_the_primary_of_postgres() -> Result<()> {
    installed!("initdb", "postgres", "pg_isready", "psql");
    let here = Place::here();
    let start =
        |standby| Postgres::start_with(&here, Kind { login: "trust", standby, encrypts: false });
    let (standby, primary) = (start(true)?, start(false)?);
    let endpoints = [Address::from(standby.address), Address::from(primary.address)];
    let more = checked("{ postgres: { user: postgres, role: primary } }");
    let behind = |way| -> Result<(Ambassador, Address)> {
        balanced_with(way, "failover", &[(&endpoints[0], 1), (&endpoints[1], 1)], &more)
    };
    let ways = by_whom()?.into_iter().map(|way| Ok((way, behind(way)?)));
    let ways = ways.collect::<Result<Vec<_>>>()?;
    let ask = |server: &Address, query: &str| -> Result<String> {
        let server = server.tcp()?;
        let mut psql = here.command("psql");
        psql.args(["-h", &server.ip().to_string(), "-p", &server.port().to_string()]);
        Ok(run(psql.args(["-U", "postgres", "-tAc", query]), SOON)?.trim().to_owned())
    };
    let which = "select inet_server_port(), pg_is_in_recovery()";
    for (way, (ambassador, route)) in &ways {
        until_is(ambassador, &endpoints[0], false).with_context(|| format!("{way}"))?;
        let told = endpoints_of(ambassador)?[0]["hosts"][0]["health"].to_string();
        ensure!(told.contains("it is a replica"), "{way}: {told}");
        let reached = ask(route, which)?;
        ensure!(reached == format!("{}|f", primary.address.port()), "{way}: {reached}");
    }
    drop(primary);
    ensure!(ask(&endpoints[0], "select pg_promote()")? == "t", "the standby is not promoted");
    for (way, (ambassador, route)) in &ways {
        until_is(ambassador, &endpoints[0], true).with_context(|| format!("{way}"))?;
        let reached = until("the new primary", SOON, || Ok(ask(route, which).ok()))?;
        ensure!(reached == format!("{}|f", standby.address.port()), "{way}: {reached}");
    }
    Ok(())
}

#[test]
fn only_so_many_checks_in_a_row_take_it_out_or_bring_it_back() -> Result<()> {
    let server = Listener::new(Family::Tcp)?;
    let more = "eject: none
    health: { check: http, interval: 100ms, timeout: 10s, fall: 3, rise: 2 }";
    let endpoints = [(server.address(), 1)];
    let (ambassador, _) = balanced_with(Way::Splice, "failover", &endpoints, more)?;
    let (passes, fails) = ("200 OK", "503 Service Unavailable");
    for (number, (healthy, answer)) in [
        (true, passes),
        (true, fails),
        (true, fails),
        (true, passes),
        (true, fails),
        (true, fails),
        (true, fails),
        (false, passes),
        (false, fails),
        (false, passes),
        (false, passes),
        (true, passes),
    ]
    .into_iter()
    .enumerate()
    {
        // It comes when the one before has been judged.
        let check = server.accept()?;
        let told = endpoints_of(&ambassador)?[0].clone();
        ensure!(told["healthy"] == healthy, "before check {number}: {told}");
        let mut asked = Vec::new();
        while !asked.ends_with(b"\r\n\r\n") {
            asked.extend(check.hear(1)?);
        }
        check.say(format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n").as_bytes())?;
    }
    Ok(())
}

/// A tenth earlier or later, so that those of many Pods do not come together. It is the same on every tier.
#[test]
fn checks_do_not_keep_to_one_beat() -> Result<()> {
    const CHECKS: usize = 12;
    let servers = (0..8).map(|_| Listener::new(Family::Tcp)).collect::<Result<Vec<_>>>()?;
    let endpoints: Vec<_> = servers.iter().map(|server| (server.address(), 1)).collect();
    let more = "health: { check: tcp, interval: 500ms, timeout: 10s, fall: 3, rise: 2 }";
    let (_ambassador, _) = balanced_with(Way::Splice, "failover", &endpoints, more)?;
    let rests = scope(|scope| {
        let seen = |server: &Listener| -> Result<Vec<Duration>> {
            let times = (0..CHECKS).map(|_| server.accept().map(|_| Instant::now()));
            let times = times.collect::<Result<Vec<_>>>()?;
            Ok(times.windows(2).map(|pair| pair[1] - pair[0]).collect())
        };
        let all = servers.iter().map(|server| scope.spawn(move || seen(server)));
        // All at the same time.
        let all: Vec<_> = all.collect();
        let joined = all.into_iter().map(|it| it.join().map_err(|_| anyhow!("it panicked"))?);
        Ok::<_, anyhow::Error>(joined.collect::<Result<Vec<_>>>()?.concat())
    })?;
    // A quarter of them each comes 0.95, 1.0, 1.05 and 1.1 intervals after the one before.
    let before = rests.iter().filter(|rest| **rest < Duration::from_millis(487)).count();
    let after = rests.iter().filter(|rest| **rest > Duration::from_millis(512)).count();
    ensure!(before >= 6 && after >= 6, "it rested {rests:?}");
    Ok(())
}

#[test]
fn nobody_checks_for_a_route_that_is_gone() -> Result<()> {
    let here = Place::here();
    let (gone, stays) = (Echo::greeting("1")?, Echo::greeting("2")?);
    let upstream = |name: &str, echo: &Echo| {
        format!("  {name}:\n    endpoints: '{}'\n    {}\n", echo.address(), checked("tcp"))
    };
    let route = |name: &str| -> Result<String> {
        Ok(format!("  - {{ listen: '127.0.0.1:{}', upstream: {name} }}\n", here.port()?))
    };
    let (one, other) = (route("gone")?, route("stays")?);
    let upstreams = upstream("gone", &gone) + &upstream("stays", &stays);
    let text = |routes: &str| format!("version: 1\nroutes:\n{routes}upstreams:\n{upstreams}");
    let ambassador = Launch::new(&here)?.config(&text(&format!("{one}{other}")))?.start()?;
    let more = |echo: &Echo, checks: usize| {
        let enough = echo.accepted() + checks;
        until_true("more checks", || Ok(echo.accepted() >= enough))
    };
    more(&gone, 2)?;
    ambassador.reconfigure(&text(&other))?.success()?;
    // One may have been under way.
    more(&stays, 2)?;
    let so_far = gone.accepted();
    more(&stays, 10)?;
    ensure!(gone.accepted() == so_far, "{} checks since", gone.accepted() - so_far);
    Ok(())
}

/// Only asking tells: by this check.
fn checked(check: &str) -> String {
    format!(
        "eject: none
    health: {{ check: {check}, interval: 100ms, timeout: 500ms, fall: 2, rise: 2 }}"
    )
}

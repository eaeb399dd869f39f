//! Endpoints that fail are taken out, and come back when they work: on every way.

use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::peer::Listener;
use ambassador_tests::wait::{until, until_true};
use ambassador_tests::way::Way;
use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::silent::ways;
use crate::{balanced_with, dead, hold, tally};

const QUICK: &str = "eject: { consecutive_failures: 3, for: 500ms }";

#[test]
fn an_endpoint_that_fails_is_left_alone_until_it_works_again() -> Result<()> {
    for way in Way::proxied()? {
        let (first, second) = (Echo::greeting("1")?, Echo::greeting("2")?);
        let address = first.address().clone();
        let endpoints = [(&address, 1), (second.address(), 1)];
        let (ambassador, route) = balanced_with(way, "failover", &endpoints, QUICK)?;
        ensure!(tally(&hold(&route, 5)?) == [("1", 5)].into(), "{way}");
        drop(first);
        // On `direct` the app itself finds out.
        ensure!(greeted(&route, 1).is_err() == (way == Way::Direct), "{way}");
        until_is(&ambassador, &address, false).with_context(|| format!("{way}"))?;
        ensure!(tally(&hold(&route, 20)?) == [("2", 20)].into(), "{way}");
        ensure!(figure(&ambassador, "ejections_total", &address)? == 1.0, "{way}");

        let _first = Echo::on(address.listen()?, "1");
        until_is(&ambassador, &address, true).with_context(|| format!("{way}"))?;
        // The kernel suspects what has failed by itself, and longer.
        until_true("a return", || Ok(greeted(&route, 1)?.0 == "1"))?;
        ensure!(figure(&ambassador, "healthy", &address)? == 1.0, "{way}");
    }
    Ok(())
}

#[test]
fn a_sticky_choice_does_not_return() -> Result<()> {
    for way in Way::proxied()? {
        let (first, second) = (Echo::greeting("1")?, Echo::greeting("2")?);
        let address = first.address().clone();
        let endpoints = [(&address, 1), (second.address(), 1)];
        let (ambassador, route) = balanced_with(way, "failover_sticky", &endpoints, QUICK)?;
        drop(first);
        let _ = greeted(&route, 1);
        until_is(&ambassador, &address, false).with_context(|| format!("{way}"))?;
        ensure!(tally(&hold(&route, 5)?) == [("2", 5)].into(), "{way}");
        let _first = Echo::on(address.listen()?, "1");
        until_is(&ambassador, &address, true).with_context(|| format!("{way}"))?;
        ensure!(tally(&hold(&route, 5)?) == [("2", 5)].into(), "{way}");
        // Nor because something else of the upstream is changed.
        let changed =
            std::fs::read_to_string(ambassador.configuration())?.replace("500ms", "501ms");
        ambassador.reconfigure(&changed)?.success()?;
        ensure!(tally(&hold(&route, 5)?) == [("2", 5)].into(), "{way}");
    }
    Ok(())
}

#[test]
fn a_failure_on_a_configuration_that_is_gone_keeps_nobody_out() -> Result<()> {
    let (first, second) = (Echo::greeting("1")?, Echo::greeting("2")?);
    let (one, two) = (first.address().clone(), second.address().clone());
    let endpoints = [(&one, 1), (&two, 1)];
    let held = format!("{QUICK}\n    connect: {{ hold: 20s }}");
    let (ambassador, route) = balanced_with(Way::Splice, "failover", &endpoints, &held)?;
    drop((first, second));
    // It goes on trying by the rules that it came under.
    let waiting = route.connect()?;
    until_is(&ambassador, &one, false)?;
    let changed = std::fs::read_to_string(ambassador.configuration())?.replace("20s", "19s");
    ambassador.reconfigure(&changed)?.success()?;
    let both = [Echo::on(one.listen()?, "1"), Echo::on(two.listen()?, "2")];
    ensure!(waiting.hear(1)?.len() == 1);
    until_is(&ambassador, &one, true)?;
    drop(both);
    let _ = greeted(&route, 1);
    until_is(&ambassador, &one, false)?;
    let _first = Echo::on(one.listen()?, "1");
    until_is(&ambassador, &one, true)
}

#[test]
fn the_only_one_that_a_reload_leaves_is_not_out() -> Result<()> {
    for way in Way::proxied()? {
        let (first, second) = (Echo::greeting("1")?, Echo::greeting("2")?);
        let address = first.address().clone();
        let endpoints = [(&address, 1), (second.address(), 1)];
        let more = "eject: { consecutive_failures: 3, for: 1h }";
        let (ambassador, route) = balanced_with(way, "failover", &endpoints, more)?;
        drop(first);
        let _ = greeted(&route, 1);
        until_is(&ambassador, &address, false).with_context(|| format!("{way}"))?;
        let both = std::fs::read_to_string(ambassador.configuration())?;
        let one = both.replace(&format!(", '{}:1'", second.address()), "");
        ensure!(one != both);
        ambassador.reconfigure(&one)?.success()?;
        until_is(&ambassador, &address, true).with_context(|| format!("{way}"))?;
        let _first = Echo::on(address.listen()?, "1");
        // The kernel suspects what has failed by itself, and has a listener try it.
        ensure!(tally(&hold(&route, 5)?) == [("1", 5)].into(), "{way}");
    }
    Ok(())
}

#[test]
fn a_client_that_leaves_while_it_is_held_gives_its_place_back() -> Result<()> {
    let address = dead()?;
    let hold = "connect: { hold: 1m }";
    let (ambassador, route) = balanced_with(Way::Splice, "failover", &[(&address, 1)], hold)?;
    let count = |expected: usize| {
        until_true(&format!("{expected} connections"), || {
            Ok(ambassador.connections()?.len() == expected)
        })
    };
    let client = route.connect()?;
    count(1)?;
    client.reset()?;
    count(0)
}

#[test]
fn enough_endpoints_always_stay() -> Result<()> {
    for way in Way::proxied()? {
        let good = Echo::greeting("g")?;
        let (one, two) = (dead()?, dead()?);
        let endpoints = [(&one, 1), (&two, 1), (good.address(), 1)];
        let more = "eject: { consecutive_failures: 1, for: 1m, max_percent: 40 }";
        let (ambassador, route) = balanced_with(way, "round_robin", &endpoints, more)?;
        let out = || -> Result<usize> {
            let endpoints = endpoints_of(&ambassador)?;
            Ok(endpoints.iter().filter(|it| it["healthy"] == false).count())
        };
        until_true("an ejection", || {
            let _ = greeted(&route, 1);
            Ok(out()? == 1)
        })?;
        for _ in 0..20 {
            let _ = greeted(&route, 1);
        }
        ensure!(out()? == 1, "{way}: {} of three are out", out()?);
    }
    Ok(())
}

#[test]
fn an_endpoint_that_resets_whoever_comes_is_taken_out() -> Result<()> {
    for way in Way::proxied()? {
        let good = Echo::greeting("g")?;
        let bad = Listener::new(Family::Tcp)?;
        let address = bad.address().clone();
        let endpoints = [(&address, 1), (good.address(), 1)];
        let more = "eject: { consecutive_failures: 3, for: 1m }";
        let (ambassador, route) = balanced_with(way, "failover", &endpoints, more)?;
        thread::scope(|scope| {
            scope.spawn(|| {
                while let Ok(client) = bad.accept() {
                    let _ = client.reset();
                }
            });
            let ejected = until_true("an ejection", || {
                // One that is reset before it was seen to be established is tried elsewhere at once.
                let heard = route.connect().and_then(|it| it.hear(1));
                ensure!(heard.as_deref().is_ok_and(|it| it == b"g") || heard.is_err());
                Ok(endpoints_of(&ambassador)?[0]["healthy"] == false)
            });
            // Else it would be waited for.
            bad.socket().shutdown(Shutdown::Both).context("end the bad server")?;
            ejected
        })
        .with_context(|| format!("{way}"))?;
        ensure!(tally(&hold(&route, 5)?) == [("g", 5)].into(), "{way}");
    }
    Ok(())
}

#[test]
fn a_connection_is_held_until_an_endpoint_can_be_reached() -> Result<()> {
    let address = dead()?;
    let hold = "connect: { hold: 30s }";
    let (ambassador, route) = balanced_with(Way::Splice, "failover", &[(&address, 1)], hold)?;
    let client = route.connect()?;
    until_true("a connection that waits", || Ok(ambassador.connections()?.len() == 1))?;
    let _back = Echo::on(address.listen()?, "b");
    ensure!(client.hear(1)? == b"b");
    Ok(())
}

#[test]
fn no_connection_fails_while_it_could_be_held() -> Result<()> {
    for way in Way::proxied()? {
        let address = dead()?;
        let more = "connect: { hold: 30s }\n    eject: none";
        let (ambassador, route) = balanced_with(way, "failover", &[(&address, 1)], more)?;
        // On `direct` an app is the first to find out.
        let first = route.connect();
        let missed = || -> Result<Option<f64>> {
            Ok(ambassador.metrics()?.sum("ambassador_direct_missed_total", &[]))
        };
        if way == Way::Direct {
            ensure!(first.is_err());
            until_true("a connection for the listener", || {
                let _ = route.connect();
                Ok(missed()?.is_some_and(|missed| missed > 0.0))
            })?;
        }
        // Longer than the kernel suspects anybody by itself.
        let begun = Instant::now();
        let mut held = Vec::new();
        while begun.elapsed() < Duration::from_secs(6) {
            held.push(route.connect().with_context(|| format!("{way}, {:?}", begun.elapsed()))?);
            thread::sleep(Duration::from_millis(200));
        }
        let _back = Echo::on(address.listen()?, "b");
        for client in held {
            ensure!(client.hear(1)? == b"b", "{way}");
        }
        if way == Way::Direct {
            until_true("a connection past the listener", || {
                let before = missed()?;
                Ok(greeted(&route, 1).is_ok() && missed()? == before)
            })?;
        }
    }
    Ok(())
}

#[test]
fn connections_to_what_is_ejected_end_only_where_that_is_wanted() -> Result<()> {
    for way in ways()? {
        for wanted in [true, false] {
            let (first, second) = (Echo::greeting("1")?, Echo::greeting("2")?);
            let address = first.address().clone();
            let endpoints = [(&address, 1), (second.address(), 1)];
            let on_unhealthy = if wanted { "close" } else { "keep" };
            let more = format!("{QUICK}\n    on_unhealthy: {on_unhealthy}");
            let (ambassador, route) = balanced_with(way, "failover", &endpoints, &more)?;
            let (_, app) = greeted(&route, 1)?;
            // A shortcut is opened for what goes on.
            (0..3).try_for_each(|_| app.ask(b"still here?", b"still here?"))?;
            let told = ambassador.connections()?;
            ensure!(told[0]["tier"] == way.to_string(), "{way}: {told:?}");
            // It accepts nobody any more, and goes on serving whom it has accepted.
            drop(first);
            let _ = greeted(&route, 1);
            until_is(&ambassador, &address, false).with_context(|| format!("{way}"))?;
            if !wanted {
                app.ask(b"still here?", b"still here?").with_context(|| format!("{way}"))?;
                continue;
            }
            let error = app.notice_failure().with_context(|| format!("{way}"))?;
            let expected = [libc::ECONNRESET, libc::ECONNABORTED];
            ensure!(
                error.raw_os_error().is_some_and(|it| expected.contains(&it)),
                "{way}: {error}"
            );
            until_true("the record", || {
                Ok(ambassador.access_records("outcome", "host_lost")?.len() == 1)
            })
            .with_context(|| format!("{way}"))?;
            ensure!(tally(&hold(&route, 5)?) == [("2", 5)].into(), "{way}");
        }
    }
    Ok(())
}

/// Waits until an endpoint is taken for healthy, or for not.
pub(crate) fn until_is(ambassador: &Ambassador, endpoint: &Address, healthy: bool) -> Result<()> {
    until(&format!("{endpoint} being healthy: {healthy}"), Duration::from_secs(15), || {
        let endpoints = endpoints_of(ambassador)?;
        let it = endpoints.iter().find(|it| it["endpoint"] == endpoint.to_string());
        Ok((it.context("find the endpoint")?["healthy"] == healthy).then_some(()))
    })
}

pub(crate) fn endpoints_of(ambassador: &Ambassador) -> Result<Vec<Value>> {
    let status = ambassador.status()?;
    Ok(status["routes"][0]["endpoints"].as_array().context("find the endpoints")?.clone())
}

fn figure(ambassador: &Ambassador, name: &str, endpoint: &Address) -> Result<f64> {
    let labels = [("upstream", "many"), ("endpoint", &endpoint.to_string())];
    let figure = ambassador.metrics()?.sum(&format!("ambassador_endpoint_{name}"), &labels);
    figure.with_context(|| format!("find {name}"))
}

//! Endpoints that come and go, alone or all at once, while names or the configuration change: on each tier but
//! `copy`, which connects as `splice` does.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::pod;
use ambassador_tests::process::run;
use ambassador_tests::server::dnsmasq::Dnsmasq;
use ambassador_tests::wait::{SOON, until_true};
use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use crate::ejection::{endpoints_of, until_is};
use crate::silent::ways;
use crate::{NAME, balanced_with, dead, hold, launch_balanced, listen, tally};

/// A connection of an app has come to something by then, be it to a failure.
const AT_ONCE: Duration = Duration::from_secs(3);

#[test]
fn an_endpoint_that_flaps_hangs_nobody_and_is_tried_less_and_less() -> Result<()> {
    const FLAP: Duration = Duration::from_millis(200);
    const FLAPS: u32 = 30;
    for way in ways()? {
        let (flapping, steady) = (Echo::greeting("1")?, Echo::greeting("2")?);
        let address = flapping.address().clone();
        let endpoints = [(&address, 1), (steady.address(), 1)];
        let more = "eject: { consecutive_failures: 1, for: 500ms }";
        let (ambassador, route) = balanced_with(way, "failover", &endpoints, more)?;
        let over = AtomicBool::new(false);
        let flapped = scope(|scope| {
            let app = scope.spawn(|| uses(&route, &over));
            let mut flapping = Some(flapping);
            let flapped = (0..FLAPS).try_for_each(|_| {
                // That is what flapping is; nothing is waited for.
                sleep(FLAP);
                flapping =
                    if flapping.take().is_some() { None } else { Some(again(&address, "1")?) };
                Ok(())
            });
            over.store(true, Ordering::Relaxed);
            let used = app.join().map_err(|_| anyhow!("the app panicked"))?;
            flapped.and(used.map(|used| (used, flapping)))
        });
        let ((used, failed), left) = flapped.with_context(|| format!("{way}"))?;
        let _back = left.map_or_else(|| again(&address, "1"), Ok)?;
        // One in a flap, and one that finds out about each return.
        ensure!(used > 100 && failed <= 2 * FLAPS, "{way}: {failed} of {used} failed");
        until_is(&ambassador, &address, true).with_context(|| format!("{way}"))?;
        until_true("a return", || Ok(greeted(&route, 1)?.0 == "1"))?;
        // Of six seconds it was out for 0.5, 1, 2 and 4.
        let told = endpoints_of(&ambassador)?;
        let ejections = told[0]["ejections"].as_u64().context("find the ejections")?;
        ensure!((1..=5).contains(&ejections), "{way}: {}", told[0]);
        ensure!(told[1]["ejections"] == 0, "{way}: {}", told[1]);
    }
    Ok(())
}

#[test]
fn when_all_were_down_the_first_that_is_back_is_found_at_once() -> Result<()> {
    for way in ways()? {
        let (one, two) = (dead()?, dead()?);
        let more = "eject: { consecutive_failures: 1, for: 1m }";
        let endpoints = [(&one, 1), (&two, 1)];
        let (ambassador, route) = balanced_with(way, "failover", &endpoints, more)?;
        let began = Instant::now();
        for _ in 0..10 {
            ensure!(greeted(&route, 1).is_err(), "{way}: somebody answered");
        }
        ensure!(began.elapsed() < AT_ONCE, "{way}: it took {:?}", began.elapsed());
        // One of them is out; that one comes back, not the one that had to stay.
        until_true("an ejection", || {
            Ok(endpoints_of(&ambassador)?.iter().any(|it| it["healthy"] == false))
        })?;
        let told = endpoints_of(&ambassador)?;
        let out = usize::from(told[0]["healthy"] == true);
        let address = endpoints[out].0;
        let _back = again(address, "b")?;
        let back = Instant::now();
        until_true("an app that is served", || Ok(greeted(&route, 1).is_ok()))
            .with_context(|| format!("{way}: {told:?}"))?;
        ensure!(back.elapsed() < AT_ONCE, "{way}: only after {:?}", back.elapsed());
        for _ in 0..5 {
            ensure!(greeted(&route, 1)?.0 == "b", "{way}");
        }
    }
    Ok(())
}

#[test]
fn an_address_that_its_name_has_left_is_tried_no_more() -> Result<()> {
    for way in ways()? {
        let pod = pod!("dnsmasq");
        let (lost, new) = (Ipv4Addr::new(10, 77, 0, 3), Ipv4Addr::new(10, 77, 0, 4));
        for more in [lost, new] {
            let add = format!("{more}/24");
            run(pod.upstream.command("ip").args(["addr", "add", &add, "dev", "eth0"]), SOON)?;
        }
        let old = Echo::on(listen(&pod, pod.upstream.ipv4.into())?, "o");
        let port = old.address().port()?;
        let at = |ip: Ipv4Addr| Address::from(SocketAddr::from((ip, port)));
        let names = |other: Ipv4Addr| [(NAME, pod.upstream.ipv4.into()), (NAME, other.into())];
        let dns = Dnsmasq::start(&pod.upstream, &names(lost))?;
        let place = pod.inside.with_resolver(&Dnsmasq::resolv_conf(pod.upstream.ipv4))?;
        let more = "dns: { max_ttl: 1s }
    eject: { consecutive_failures: 1, for: 500ms }";
        let endpoint = format!("'{NAME}:{port}'");
        let launch = way.launch(&place)?;
        let (ambassador, route) = launch_balanced(launch, &place, "failover", &endpoint, more)?;
        let ejected = |ip: Ipv4Addr| -> Result<Option<bool>> {
            let told = endpoints_of(&ambassador)?;
            let hosts = told[0]["hosts"].as_array().context("find the hosts")?;
            let host = hosts.iter().find(|it| it["address"] == at(ip).to_string());
            Ok(host.map(|host| host["healthy"] == false))
        };
        until_true("an ejection", || {
            let _ = pod.inside.enter(|| greeted(&route, 1));
            Ok(ejected(lost)? == Some(true))
        })
        .with_context(|| format!("{way}"))?;

        let new_server = Echo::on(pod.upstream.enter(|| at(new).listen())?, "n");
        dns.answer(&names(new))?;
        until_true("the name's new address", || Ok(ejected(new)? == Some(false)))
            .with_context(|| format!("{way}"))?;
        ensure!(ejected(lost)?.is_none(), "{way}: still known");
        until_true("a connection there", || Ok(pod.inside.enter(|| greeted(&route, 1))?.0 == "n"))?;
        let bystander = pod.upstream.enter(|| at(lost).listen())?;
        let trials = Duration::from_secs(3);
        bystander.socket().set_read_timeout(Some(trials)).context("bound the waiting")?;
        ensure!(bystander.accept().is_err(), "{way}: it is somebody else's by now, but is tried");
        ensure!(new_server.accepted() > 0);
    }
    Ok(())
}

#[test]
fn a_reload_leaves_out_what_is_out_unless_the_rules_are_gone() -> Result<()> {
    for way in ways()? {
        let (first, second) = (Echo::greeting("1")?, Echo::greeting("2")?);
        let address = first.address().clone();
        let endpoints = [(&address, 1), (second.address(), 1)];
        let rules = "eject: { consecutive_failures: 1, for: 2s }";
        let (ambassador, route) = balanced_with(way, "failover", &endpoints, rules)?;
        let text = std::fs::read_to_string(ambassador.configuration())?;
        drop(first);
        let _ = greeted(&route, 1);
        until_is(&ambassador, &address, false).with_context(|| format!("{way}"))?;

        let other = text.replace(rules, &format!("{rules}\n    connect: {{ timeout: 1s }}"));
        ambassador.reconfigure(&other)?.success()?;
        let told = first_of(&ambassador)?;
        ensure!(told["healthy"] == false && told["ejections"] == 1, "{way}: {told}");
        ensure!(tally(&hold(&route, 10)?) == [("2", 10)].into(), "{way}");
        let back = again(&address, "1")?;
        until_is(&ambassador, &address, true).with_context(|| format!("{way}: a return"))?;
        until_true("a return", || Ok(greeted(&route, 1)?.0 == "1"))?;

        drop(back);
        let _ = greeted(&route, 1);
        until_is(&ambassador, &address, false).with_context(|| format!("{way}: again"))?;
        ambassador.reconfigure(&text.replace(rules, "eject: none"))?.success()?;
        let told = first_of(&ambassador)?;
        ensure!(told["healthy"] == true, "{way}: {told}");
        let _back = again(&address, "1")?;
        until_true("a second return", || Ok(greeted(&route, 1)?.0 == "1"))?;
    }
    Ok(())
}

/// Connects again and again; returns how often, and how often in vain.
fn uses(route: &Address, over: &AtomicBool) -> Result<(u32, u32)> {
    let (mut used, mut failed) = (0, 0);
    while !over.load(Ordering::Relaxed) {
        let began = Instant::now();
        failed += u32::from(greeted(route, 1).is_err());
        used += 1;
        ensure!(began.elapsed() < AT_ONCE, "a connection took {:?}", began.elapsed());
    }
    Ok((used, failed))
}

/// A server where there was one before, or is to be one.
fn again(address: &Address, greeting: &'static str) -> Result<Echo> {
    Ok(Echo::on(address.listen()?, greeting))
}

fn first_of(ambassador: &Ambassador) -> Result<Value> {
    Ok(endpoints_of(ambassador)?[0].clone())
}

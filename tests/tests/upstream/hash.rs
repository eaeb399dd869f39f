//! `source_hash`: a source stays where it is while that works, and comes back to it; on each tier but `copy`, which
//! connects as `splice` does.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::peer::Peer;
use ambassador_tests::pod;
use ambassador_tests::pod::Pod;
use ambassador_tests::process::run;
use ambassador_tests::wait::{SOON, until_true};
use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};

use crate::ejection::until_is;
use crate::silent::ways;
use crate::{balanced_with, hold, launch_balanced, listen, tally};

const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const CHECKED: &str = "eject: none
    health: { check: tcp, interval: 100ms, timeout: 1s, fall: 2, rise: 2 }";

#[test]
fn a_pod_moves_only_while_its_endpoint_is_gone() -> Result<()> {
    for way in ways()? {
        let mut servers = BTreeMap::new();
        for name in NAMES {
            servers.insert(name, Echo::greeting(name)?);
        }
        let addresses: BTreeMap<_, _> =
            servers.iter().map(|(name, echo)| (*name, echo.address().clone())).collect();
        let endpoints: Vec<_> = addresses.values().map(|address| (address, 1)).collect();
        let (ambassador, route) = balanced_with(way, "source_hash", &endpoints, CHECKED)?;
        let chosen = greeted(&route, 1)?.0;
        let all_reach = |name: &str, when: &str| -> Result<()> {
            let held = hold(&route, 10)?;
            let reached = tally(&held);
            ensure!(reached == [(name, 10)].into(), "{way}, {when}: {reached:?} and not {name}");
            Ok(())
        };
        all_reach(&chosen, "first")?;
        let healthy = |name: &str, healthy| {
            until_is(&ambassador, &addresses[name], healthy).with_context(|| format!("{way}"))
        };
        for other in NAMES.into_iter().filter(|name| *name != chosen) {
            servers.remove(other);
            healthy(other, false)?;
            all_reach(&chosen, "without another")?;
            servers.insert(other, Echo::on(addresses[other].listen()?, other));
            healthy(other, true)?;
            all_reach(&chosen, "with all again")?;
        }

        servers.remove(&*chosen);
        healthy(&chosen, false)?;
        let second = greeted(&route, 1)?.0;
        all_reach(&second, "without it")?;
        let name = NAMES.into_iter().find(|name| *name == chosen).context("find its name")?;
        servers.insert(name, Echo::on(addresses[name].listen()?, name));
        healthy(name, true)?;
        until_true("a return", || Ok(greeted(&route, 1)?.0 == chosen))
            .with_context(|| format!("{way}"))?;
        all_reach(&chosen, "with it again")?;
    }
    Ok(())
}

/// They come to the listener on every tier.
#[test]
fn of_clients_from_elsewhere_only_those_of_an_endpoint_that_is_gone_move() -> Result<()> {
    for way in ways()? {
        let pod = pod!();
        let sources = sources(&pod)?;
        let mut servers = Vec::new();
        for name in NAMES {
            servers.push(Echo::on(listen(&pod, pod.upstream.ipv4.into())?, name));
        }
        let addresses: Vec<_> = servers.iter().map(|echo| echo.address().clone()).collect();
        let endpoints: Vec<_> = addresses.iter().map(|address| format!("'{address}'")).collect();
        let launch = way.launch(&pod.inside)?;
        let (ambassador, route) =
            launch_balanced(launch, &pod.inside, "source_hash", &endpoints.join(", "), CHECKED)?;
        let route = on_all_addresses(&ambassador, &pod, &route)?;
        let reached = || -> Result<Vec<String>> {
            sources.iter().map(|source| reached_from(*source, &pod, &route)).collect()
        };
        let first = reached()?;
        ensure!(first.iter().any(|name| *name != first[0]), "{way}: all of them are at one");
        ensure!(reached()? == first, "{way}: they wander");

        let lost = NAMES.iter().position(|name| *name == first[0]).context("find the server")?;
        drop(servers.remove(lost));
        let meanwhile = reached()?;
        let stayed = |(before, now): (&String, &String)| (before == now) == (before != NAMES[lost]);
        ensure!(first.iter().zip(&meanwhile).all(stayed), "{way}: {first:?}, then {meanwhile:?}");
        until_is(&ambassador, &addresses[lost], false).with_context(|| format!("{way}"))?;
        ensure!(reached()? == meanwhile, "{way}: they wander once more");

        let back = pod.upstream.enter(|| addresses[lost].listen())?;
        let _back = Echo::on(back, NAMES[lost]);
        until_is(&ambassador, &addresses[lost], true).with_context(|| format!("{way}"))?;
        ensure!(reached()? == first, "{way}: they do not come back");
    }
    Ok(())
}

/// More addresses of the place at the other end of the pod's cable.
fn sources(pod: &Pod) -> Result<Vec<Ipv4Addr>> {
    let sources = (100..124).map(|last| Ipv4Addr::new(10, 77, 0, last));
    let add = |source: Ipv4Addr| {
        let address = format!("{source}/24");
        run(pod.upstream.command("ip").args(["addr", "add", &address, "dev", "eth0"]), SOON)?;
        Ok(source)
    };
    sources.map(add).collect()
}

/// Has the route listen where others than the pod's apps reach it.
fn on_all_addresses(ambassador: &Ambassador, pod: &Pod, route: &Address) -> Result<Address> {
    let port = route.port()?;
    let text = std::fs::read_to_string(ambassador.configuration())?;
    let text = text.replace(&format!("'{route}'"), &format!("'0.0.0.0:{port}'"));
    ambassador.reconfigure(&text)?.success()?;
    Ok(SocketAddr::from((pod.inside.ipv4, port)).into())
}

fn reached_from(source: Ipv4Addr, pod: &Pod, route: &Address) -> Result<String> {
    let client = pod.upstream.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((source, 0)).into()).context("bind a source")?;
        socket.connect(&route.tcp()?.into()).context("connect from elsewhere")?;
        Peer::of(socket)
    })?;
    Ok(String::from_utf8_lossy(&client.hear(1)?).into_owned())
}

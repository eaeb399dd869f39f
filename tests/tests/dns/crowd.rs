//! Many names at once: no flood of questions or of words, and none is held up by those that nobody answers for.
//! And a name of more addresses than a table of the kernel has room for.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hickory_proto::rr::RecordType;

use ambassador_tests::server::scripted_dns::{Reply, ScriptedDns};
use ambassador_tests::wait::until_true;
use ambassador_tests::way::Way;
use ambassador_tests::{needs, pod};

use crate::{NAME, ONE, Scene, endpoint};

/// Names of which a server knows one address each, except those that it is silent about.
fn many(dns: &ScriptedDns, silent: usize, count: usize) -> Result<()> {
    for number in 0..count {
        let name = format!("n{number}.test");
        dns.knows(&name, 60, &[ONE.into()])?;
        for kind in [RecordType::A, RecordType::AAAA].into_iter().filter(|_| number < silent) {
            dns.says(&name, kind, Reply::Silence);
        }
    }
    Ok(())
}

fn endpoints(count: usize) -> String {
    let names: Vec<_> = (0..count).map(|number| format!("'n{number}.test:1'")).collect();
    format!("endpoints: [{}]", names.join(", "))
}

#[test]
fn many_names_are_asked_for_by_and_by() -> Result<()> {
    let script = |dns: &ScriptedDns| {
        dns.lags(RecordType::A, Duration::from_millis(100));
        dns.lags(RecordType::AAAA, Duration::from_millis(100));
        many(dns, 0, 60)
    };
    let scene = Scene::new(pod!(), script, &endpoints(60))?;
    for number in 0..60 {
        until_true("an address of every name", || Ok(scene.known_of(number)? == "127.0.1.1"))?;
    }
    let open = scene.dns.most_open();
    ensure!(open <= 2 * 16, "{open} questions at a time");
    Ok(())
}

#[test]
fn names_that_nobody_answers_for_hold_up_no_other_for_long() -> Result<()> {
    let scene = Scene::new(pod!(), |dns| many(dns, 50, 51), &endpoints(51))?;
    let begun = Instant::now();
    until_true("an answer", || Ok(scene.known_of(50)? == "127.0.1.1"))?;
    // 16 at a time, each for half a second; a silent server is waited for four times as long.
    ensure!(begun.elapsed() < Duration::from_secs(4), "it took {:?}", begun.elapsed());
    Ok(())
}

#[test]
fn what_keeps_failing_is_said_once_and_so_is_its_end() -> Result<()> {
    let pod = pod!();
    let script = |dns: &ScriptedDns| dns.knows(NAME, 0, &[ONE.into()]);
    let scene = Scene::new(pod, script, &endpoint(1))?;
    until_true("an address", || Ok(scene.known()? == "127.0.1.1"))?;
    scene.dns.says_of_addresses(NAME, &Reply::NoSuchName);
    scene.warns("cannot resolve")?;
    scene.is_asked(NAME, 8)?;
    scene.dns.knows(NAME, 0, &[ONE.into()])?;
    let said = |words: &str| {
        let log = scene.ambassador.log()?;
        anyhow::Ok(log.iter().filter(|it| it.to_string().contains(words)).count())
    };
    until_true("the end of it", || Ok(said("resolves again")? == 1))?;
    let warnings = said("cannot resolve")?;
    ensure!(warnings == 1, "{warnings} warnings");
    Ok(())
}

#[test]
fn of_more_addresses_than_the_kernel_has_room_for_a_pod_takes_some_of_its_own() -> Result<()> {
    needs!(Direct);
    let pod = pod!();
    let port = pod.inside.port()?;
    let all: Vec<_> = (1..=200).map(|n| IpAddr::from([127, 0, 4, n])).collect();
    let server = pod.inside.enter(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?))?;
    let scene = Scene::with(
        pod,
        |dns| dns.knows(NAME, 60, &all),
        &endpoint(port),
        "",
        |place| Way::Direct.launch(place),
    )?;
    until_true("the addresses", || Ok(scene.known()?.split(' ').count() == all.len()))?;
    let reached = || {
        let app = scene.pod.inside.enter(|| scene.route.connect())?;
        let (served, _) = server.accept()?;
        // The app ends it, also if a process that begins has its descriptor for a moment: of a server that does,
        // the kernel would be in doubt.
        app.finish()?;
        anyhow::Ok(served.local_addr()?.ip())
    };
    // Those of before the table was written went through the listener.
    until_true("connections that repeat after 64", || {
        let turns = (0..128).map(|_| reached()).collect::<Result<Vec<_>>>()?;
        Ok(turns[..64] == turns[64..])
    })?;
    let turns = (0..64).map(|_| reached()).collect::<Result<Vec<_>>>()?;
    let taken: BTreeSet<_> = turns.iter().copied().collect();
    ensure!(taken.len() == 64, "{} addresses, by turns {turns:?}", taken.len());
    ensure!(!taken.iter().eq(&all[..64]), "the first ones, as in every Pod");
    Ok(())
}

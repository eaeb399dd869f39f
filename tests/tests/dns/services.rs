//! Endpoints that are services: where SRV records lead, by their ports, and never past those of the lowest
//! priority while there are any.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hickory_proto::rr::{Record, RecordType};

use ambassador_tests::echo::Echo;
use ambassador_tests::pod::Pod;
use ambassador_tests::server::scripted_dns::{Reply, ScriptedDns, address, service};
use ambassador_tests::wait::until_true;
use ambassador_tests::way::Way;
use ambassador_tests::{needs, pod};

use crate::{ONE, Scene, TWO, echo};

const SERVICE: &str = "_redis._tcp.cache.test";
const UPSTREAM: &str =
    "endpoints: 'srv:_redis._tcp.cache.test', dns: { min_ttl: 200ms, max_ttl: 400ms }";

/// A server by each of these targets and priorities, all at ports of their own.
struct Servers {
    records: Vec<Record>,
    _echos: Vec<Echo>,
}

impl Servers {
    fn start(pod: &Pod, all: &[(&'static str, u16, Ipv4Addr)]) -> Result<Self> {
        let (mut records, mut echos) = (Vec::new(), Vec::new());
        for (greeting, priority, ip) in all {
            let port = pod.inside.port()?;
            echos.push(echo(pod, *ip, port, greeting)?);
            records.push(service(SERVICE, 0, *priority, port, &target(greeting))?);
        }
        Ok(Self { records, _echos: echos })
    }

    /// Has the service lead to [`THREE`], and those to where they are.
    fn are_known(&self, dns: &ScriptedDns) -> Result<()> {
        self.are_told(dns, THREE.len());
        THREE
            .iter()
            .try_for_each(|(greeting, _, ip)| dns.knows(&name(greeting), 0, &[(*ip).into()]))
    }

    /// Has the service lead to the first so many of them.
    fn are_told(&self, dns: &ScriptedDns, count: usize) {
        dns.says(SERVICE, RecordType::SRV, Reply::Records(self.records[..count].to_vec()));
    }
}

/// Two of the first priority, and one of the second.
const THREE: [(&str, u16, Ipv4Addr); 3] = [("a", 1, ONE), ("b", 1, TWO), ("c", 2, ONE)];

fn target(greeting: &str) -> String {
    format!("{greeting}.cache.test.")
}

fn name(greeting: &str) -> String {
    target(greeting).trim_end_matches('.').to_owned()
}

/// Waits until connections take turns at exactly these.
fn takes_turns(scene: &Scene, wanted: &[&str]) -> Result<()> {
    let wanted: BTreeSet<_> = wanted.iter().map(|it| (*it).to_owned()).collect();
    until_true(&format!("{wanted:?}"), || {
        let reached: Result<BTreeSet<_>> =
            (0..2 * wanted.len()).map(|_| scene.greeting()).collect();
        Ok(reached.is_ok_and(|reached| reached == wanted))
    })
}

fn lowest_first(pod: Pod, way: Way) -> Result<()> {
    let servers = Servers::start(&pod, &THREE)?;
    let scene =
        Scene::with(pod, |dns| servers.are_known(dns), UPSTREAM, "", |place| way.launch(place))?;
    takes_turns(&scene, &["a", "b"])?;
    // One that is known no more leaves the other; without both, the next priority has its turn.
    for (gone, left) in [("a", "b"), ("b", "c")] {
        scene.dns.says_of_addresses(&name(gone), &Reply::NoSuchName);
        takes_turns(&scene, &[left])?;
    }
    scene.dns.knows(&name("a"), 0, &[ONE.into()])?;
    takes_turns(&scene, &["a"])?;
    let known = scene.known()?;
    ensure!(known.starts_with("127.0.1.1:") && !known.contains(' '), "{known}");
    Ok(())
}

#[test]
fn only_the_lowest_priority_is_used_while_it_leads_anywhere() -> Result<()> {
    lowest_first(pod!(), Way::Splice)
}

#[test]
fn the_same_is_so_in_the_kernel() -> Result<()> {
    needs!(Direct);
    lowest_first(pod!(), Way::Direct)
}

#[test]
fn a_service_is_followed_and_its_last_good_targets_stay() -> Result<()> {
    let pod = pod!();
    let servers = Servers::start(&pod, &[("a", 1, ONE), ("b", 1, ONE)])?;
    // Their addresses stand beside the answer, and nobody knows them otherwise.
    let beside = ["a", "b"].map(|it| address(&target(it), 0, ONE.into()));
    let beside = beside.into_iter().collect::<Result<Vec<_>>>()?;
    let leads_to = |dns: &ScriptedDns, records: &[Record]| {
        dns.says(SERVICE, RecordType::SRV, Reply::Beside(records.to_vec(), beside.clone()));
    };
    let script = |dns: &ScriptedDns| {
        leads_to(dns, &servers.records[..1]);
        Ok(())
    };
    let scene = Scene::new(pod, script, UPSTREAM)?;
    takes_turns(&scene, &["a"])?;
    leads_to(&scene.dns, &servers.records);
    takes_turns(&scene, &["a", "b"])?;
    leads_to(&scene.dns, &servers.records[1..]);
    takes_turns(&scene, &["b"])?;
    // The root says that there is no such service.
    let nowhere = vec![service(SERVICE, 0, 1, 1, ".")?];
    for reply in [Reply::NoSuchName, Reply::Failure, Reply::Records(nowhere)] {
        scene.dns.says(SERVICE, RecordType::SRV, reply);
        scene.is_asked(SERVICE, 2)?;
        scene.reaches_at_once("b")?;
    }
    ensure!(scene.dns.asked(&name("a")) == 0, "what stood beside the answer was asked for");
    leads_to(&scene.dns, &servers.records[..1]);
    takes_turns(&scene, &["a"])
}

#[test]
fn a_target_that_is_not_answered_for_stays_where_it_was() -> Result<()> {
    let pod = pod!();
    let servers = Servers::start(&pod, &THREE)?;
    let scene = Scene::new(pod, |dns| servers.are_known(dns), UPSTREAM)?;
    takes_turns(&scene, &["a", "b"])?;
    let known = scene.known()?;
    // What has no address of the other family, and what leads nowhere in both, is as little an answer.
    for (v4, v6) in [
        (Reply::Failure, Reply::Records(Vec::new())),
        (Reply::Failure, Reply::Failure),
        (Reply::Silence, Reply::Silence),
    ] {
        scene.dns.says(&name("a"), RecordType::A, v4);
        scene.dns.says(&name("a"), RecordType::AAAA, v6);
        scene.is_asked(SERVICE, 3)?;
        ensure!(scene.known()? == known, "{}", scene.known()?);
        takes_turns(&scene, &["a", "b"])?;
    }
    // What the others are told is followed.
    scene.dns.knows(&name("b"), 0, &[Ipv4Addr::new(127, 0, 1, 3).into()])?;
    until_true("the new address", || Ok(scene.known()?.contains("127.0.1.3")))?;
    ensure!(scene.known()?.contains("127.0.1.1"), "{}", scene.known()?);
    scene.dns.says_of_addresses(&name("a"), &Reply::NoSuchName);
    until_true("the end of the target", || Ok(!scene.known()?.contains("127.0.1.1")))
}

#[test]
fn silence_about_some_targets_does_not_keep_others_from_being_found() -> Result<()> {
    const TARGETS: [&str; 12] = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"];
    let pod = pod!();
    let all = TARGETS.map(|greeting| (greeting, 1, ONE));
    let servers = Servers::start(&pod, &all)?;
    let script = |dns: &ScriptedDns| {
        servers.are_told(dns, TARGETS.len());
        for silent in &TARGETS[..11] {
            dns.says_of_addresses(&name(silent), &Reply::Silence);
        }
        dns.knows(&name("l"), 0, &[ONE.into()])
    };
    let begun = Instant::now();
    let scene = Scene::new(pod, script, UPSTREAM)?;
    scene.reaches("l")?;
    // Each silence lasts two seconds and more.
    ensure!(begun.elapsed() < Duration::from_secs(10), "it took {:?}", begun.elapsed());
    Ok(())
}

#[test]
fn a_service_makes_no_burst_of_questions() -> Result<()> {
    let pod = pod!();
    let servers = Servers::start(&pod, &[("a", 1, ONE)])?;
    let script = |dns: &ScriptedDns| {
        servers.are_told(dns, 1);
        dns.knows(&name("a"), 0, &[ONE.into()])
    };
    let scene = Scene::new(pod, script, UPSTREAM)?;
    scene.reaches("a")?;
    let asked = || (scene.dns.asked(SERVICE), scene.dns.asked(&name("a")));
    let (begun, before) = (Instant::now(), asked());
    while begun.elapsed() < Duration::from_secs(1) {
        scene.reaches_at_once("a")?;
    }
    let (after, most) = (asked(), begun.elapsed().as_millis() as usize / 200 + 1);
    let (services, targets) = (after.0 - before.0, after.1 - before.1);
    ensure!((2..=most).contains(&services), "{services} questions, and {most} at most");
    ensure!(targets <= 2 * most, "{targets} questions for the target");
    Ok(())
}

//! Names whose server does what it may, and what it may not: failures, silence, answers too long for a datagram,
//! none to be kept, aliases. A connection never waits for it while an address is known, and it is never asked
//! more than it has to be. What dnsmasq can show is in `upstream/` and `direct/`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hickory_proto::rr::RecordType;

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::{Ambassador, Launch};
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::place::Place;
use ambassador_tests::pod;
use ambassador_tests::pod::Pod;
use ambassador_tests::server::dnsmasq::Dnsmasq;
use ambassador_tests::server::scripted_dns::{Reply, ScriptedDns, address, alias};
use ambassador_tests::wait::until_true;

mod crowd;
mod left;
mod lost;
mod services;

const NAME: &str = "service.test";
/// A connection that waits for nobody takes no longer, on a busy machine too.
const AT_ONCE: Duration = Duration::from_millis(700);

/// A pod, its name server, and an ambassador with one route.
struct Scene {
    pod: Pod,
    dns: ScriptedDns,
    ambassador: Ambassador,
    route: Address,
}

impl Scene {
    /// With a server that knows this, and what is said of the upstream.
    fn new(pod: Pod, script: impl Fn(&ScriptedDns) -> Result<()>, upstream: &str) -> Result<Self> {
        Self::with(pod, script, upstream, "", Launch::new)
    }

    /// The same, with more lines of the configuration, launched so.
    fn with(
        pod: Pod,
        script: impl Fn(&ScriptedDns) -> Result<()>,
        upstream: &str,
        more: &str,
        launch: impl FnOnce(&Place) -> Result<Launch>,
    ) -> Result<Self> {
        let dns = ScriptedDns::start(&pod.upstream)?;
        script(&dns)?;
        let place = pod.inside.with_resolver(&Dnsmasq::resolv_conf(pod.upstream.ipv4))?;
        let route = Address::from(SocketAddr::from((Ipv4Addr::LOCALHOST, place.port()?)));
        let config = format!(
            "version: 1
{more}
routes: [{{ name: named, listen: '{route}', upstream: many }}]
upstreams: {{ many: {{ {upstream} }} }}
"
        );
        let ambassador = launch(&place)?.config(&config)?.start()?;
        Ok(Self { pod, dns, ambassador, route })
    }

    /// Connects, and returns what greets.
    fn greeting(&self) -> Result<String> {
        Ok(self.pod.inside.enter(|| greeted(&self.route, 1))?.0)
    }

    fn reaches(&self, wanted: &str) -> Result<()> {
        until_true(&format!("a connection to {wanted}"), || {
            Ok(self.greeting().is_ok_and(|greeting| greeting == wanted))
        })
        .with_context(|| format!("the log was: {}", self.ambassador.process.stderr()))
    }

    /// Connects to what is known already.
    fn reaches_at_once(&self, wanted: &str) -> Result<()> {
        let begun = Instant::now();
        let greeting = self.greeting()?;
        ensure!(greeting == wanted, "{greeting}");
        ensure!(begun.elapsed() < AT_ONCE, "it took {:?}", begun.elapsed());
        Ok(())
    }

    fn leads_nowhere(&self) -> Result<()> {
        until_true("the end of all connections", || Ok(self.greeting().is_err()))
    }

    /// What is known of where the name points.
    fn known(&self) -> Result<String> {
        self.known_of(0)
    }

    fn known_of(&self, endpoint: usize) -> Result<String> {
        let status = self.ambassador.status()?;
        let known = status["routes"][0]["endpoints"][endpoint]["addresses"].as_str();
        Ok(known.context("find the addresses")?.to_owned())
    }

    fn warns(&self, words: &str) -> Result<()> {
        until_true(&format!("a warning of {words:?}"), || {
            let log = self.ambassador.log()?;
            Ok(log.iter().any(|it| it["level"] == "WARN" && it.to_string().contains(words)))
        })
    }

    /// Waits until the server was asked for a name so often again.
    fn is_asked(&self, name: &str, times: usize) -> Result<()> {
        let before = self.dns.asked(name);
        until_true("questions", || Ok(self.dns.asked(name) >= before + times))
    }
}

/// A server in a pod, at this address of its loopback.
fn echo(pod: &Pod, ip: impl Into<IpAddr>, port: u16, greeting: &'static str) -> Result<Echo> {
    let address = Address::from(SocketAddr::new(ip.into(), port));
    Ok(Echo::on(pod.inside.enter(|| address.listen())?, greeting))
}

fn endpoint(port: u16) -> String {
    format!("endpoints: '{NAME}:{port}', dns: {{ min_ttl: 200ms, max_ttl: 400ms }}")
}

const ONE: Ipv4Addr = Ipv4Addr::new(127, 0, 1, 1);
const TWO: Ipv4Addr = Ipv4Addr::new(127, 0, 1, 2);

#[test]
fn answers_that_may_not_be_kept_make_no_burst_of_questions() -> Result<()> {
    let pod = pod!();
    let port = pod.inside.port()?;
    let _echo = echo(&pod, ONE, port, "1")?;
    let scene = Scene::new(pod, |dns| dns.knows(NAME, 0, &[ONE.into()]), &endpoint(port))?;
    scene.reaches("1")?;
    let (begun, before) = (Instant::now(), scene.dns.asked(NAME));
    while begun.elapsed() < Duration::from_secs(1) {
        scene.reaches_at_once("1")?;
    }
    let asked = scene.dns.asked(NAME) - before;
    // Both families, each 200 ms at the most.
    let most = 2 * (begun.elapsed().as_millis() / 200 + 1);
    ensure!((4..=most).contains(&(asked as u128)), "{asked} questions, and {most} at most");
    Ok(())
}

#[test]
fn while_the_server_fails_the_last_good_addresses_stay() -> Result<()> {
    let pod = pod!();
    let port = pod.inside.port()?;
    let _echos = [echo(&pod, ONE, port, "1")?, echo(&pod, TWO, port, "2")?];
    let scene = Scene::new(pod, |dns| dns.knows(NAME, 0, &[ONE.into()]), &endpoint(port))?;
    scene.reaches("1")?;
    for reply in [Reply::Failure, Reply::NoSuchName, Reply::Records(Vec::new()), Reply::Silence] {
        scene.dns.says_of_addresses(NAME, &reply);
        scene.is_asked(NAME, 3)?;
        scene.reaches_at_once("1").with_context(|| format!("with {reply:?}"))?;
    }
    scene.warns("the last good addresses stay in use")?;
    scene.dns.knows(NAME, 0, &[TWO.into()])?;
    scene.reaches("2")
}

#[test]
fn what_shall_not_be_stale_is_given_up_when_the_server_fails() -> Result<()> {
    let pod = pod!();
    let port = pod.inside.port()?;
    let _echo = echo(&pod, ONE, port, "1")?;
    let upstream = endpoint(port).replace("400ms", "400ms, stale: false");
    let scene = Scene::new(pod, |dns| dns.knows(NAME, 0, &[ONE.into()]), &upstream)?;
    for reply in [Reply::Failure, Reply::NoSuchName] {
        scene.reaches("1")?;
        scene.dns.says_of_addresses(NAME, &reply);
        scene.leads_nowhere()?;
        scene.dns.knows(NAME, 0, &[ONE.into()])?;
    }
    scene.reaches("1")
}

#[test]
fn a_server_that_fails_is_asked_ever_less() -> Result<()> {
    let pod = pod!();
    let upstream = format!("endpoints: '{NAME}:1', dns: {{ min_ttl: 100ms, max_ttl: 30s }}");
    let scene = Scene::new(
        pod,
        |dns| {
            dns.says_of_addresses(NAME, &Reply::Failure);
            Ok(())
        },
        &upstream,
    )?;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        ensure!(scene.greeting().is_err(), "a connection to nobody");
    }
    // After 0, 100, 300, 700, 1500 ms; two families, each tried again and over TCP.
    let asked = scene.dns.asked(NAME);
    ensure!(asked <= 6 * 2 * 4, "{asked} questions in {:?}", begun.elapsed());
    Ok(())
}

#[test]
fn a_name_that_nobody_answers_for_is_given_up_within_the_time_of_an_attempt() -> Result<()> {
    let pod = pod!();
    let upstream = format!("endpoints: '{NAME}:1', connect: {{ timeout: 500ms, attempts: 1 }}");
    let scene = Scene::new(
        pod,
        |dns| {
            dns.says_of_addresses(NAME, &Reply::Silence);
            Ok(())
        },
        &upstream,
    )?;
    let begun = Instant::now();
    ensure!(scene.greeting().is_err(), "a connection to nobody");
    let took = begun.elapsed();
    ensure!(took >= Duration::from_millis(450) && took < Duration::from_secs(2), "{took:?}");
    Ok(())
}

#[test]
fn a_family_that_is_not_answered_for_in_time_stays_as_it_was() -> Result<()> {
    let pod = pod!();
    let port = pod.inside.port()?;
    let _echo = echo(&pod, ONE, port, "1")?;
    let both = [ONE.into(), Ipv6Addr::LOCALHOST.into()];
    let scene = Scene::new(pod, |dns| dns.knows(NAME, 0, &both), &endpoint(port))?;
    scene.reaches("1")?;
    for reply in [Reply::Silence, Reply::Failure] {
        scene.dns.says(NAME, RecordType::A, reply);
        // Nobody listens at the address that is left.
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(1) {
            scene.reaches_at_once("1")?;
        }
        ensure!(scene.known()?.contains(&ONE.to_string()), "{}", scene.known()?);
    }
    // That there is none is an answer.
    scene.dns.says(NAME, RecordType::A, Reply::Records(Vec::new()));
    until_true("the other address alone", || Ok(scene.known()? == "::1"))
}

/// Two families, of which one is answered for late.
fn two_families(pod: Pod, ttl: u32, max_ttl: &str) -> Result<Scene> {
    let script = |dns: &ScriptedDns| {
        dns.lags(RecordType::AAAA, Duration::from_millis(300));
        dns.knows(NAME, ttl, &[ONE.into(), Ipv6Addr::LOCALHOST.into()])
    };
    Scene::new(pod, script, &endpoint(1).replace("400ms", max_ttl))
}

#[test]
fn a_family_that_is_always_slower_is_followed() -> Result<()> {
    let pod = pod!();
    let scene = two_families(pod, 0, "400ms")?;
    until_true("both families", || Ok(scene.known()? == "127.0.1.1 ::1"))?;
    let other = "fd00::1".parse::<Ipv6Addr>()?;
    scene.dns.knows(NAME, 0, &[ONE.into(), other.into()])?;
    until_true("the new address alone", || Ok(scene.known()? == "127.0.1.1 fd00::1"))
}

#[test]
fn a_family_that_was_left_out_in_haste_is_asked_for_soon() -> Result<()> {
    let pod = pod!();
    let scene = two_families(pod, 60, "60s")?;
    until_true("both families", || Ok(scene.known()? == "127.0.1.1 ::1"))
}

#[test]
fn an_answer_too_long_for_a_datagram_is_asked_for_by_tcp() -> Result<()> {
    let pod = pod!();
    let all: Vec<_> =
        (0..400_u16).map(|n| IpAddr::from([127, 1, (n >> 8) as u8, n as u8])).collect();
    let port = pod.inside.port()?;
    let _echo = echo(&pod, Ipv4Addr::UNSPECIFIED, port, "1")?;
    let scene = Scene::new(pod, |dns| dns.knows(NAME, 1, &all), &endpoint(port))?;
    scene.reaches("1")?;
    ensure!(scene.dns.asked_over_tcp(NAME) > 0);
    // So many are kept.
    let known = scene.known()?.split(' ').count();
    ensure!(known == 256, "{known} addresses");
    Ok(())
}

#[test]
fn aliases_are_followed_and_those_that_lead_nowhere_cost_little() -> Result<()> {
    let pod = pod!();
    let port = pod.inside.port()?;
    let _echos = [echo(&pod, ONE, port, "1")?, echo(&pod, TWO, port, "2")?];
    let aliases = |dns: &ScriptedDns, links: &[(&str, &str)]| {
        for (name, of) in links {
            dns.says_of_addresses(name, &Reply::Records(vec![alias(name, 0, of)?]));
        }
        anyhow::Ok(())
    };
    let chain = [(NAME, "a.test"), ("a.test", "b.test"), ("b.test", "c.test")];
    // Each link is a question of its own.
    let script = |dns: &ScriptedDns| {
        aliases(dns, &chain)?;
        dns.knows("c.test", 0, &[ONE.into()])
    };
    let scene = Scene::new(pod, script, &endpoint(port))?;
    scene.reaches("1")?;
    // All links in one answer.
    let whole = vec![alias(NAME, 0, "d.test")?, alias("d.test", 0, "e.test")?];
    let a = [whole.clone(), vec![address("e.test", 0, TWO.into())?]].concat();
    scene.dns.says(NAME, RecordType::A, Reply::Records(a));
    scene.dns.says(NAME, RecordType::AAAA, Reply::Records(whole));
    scene.reaches("2")?;

    aliases(&scene.dns, &[(NAME, "a.test"), ("a.test", "b.test"), ("b.test", NAME)])?;
    scene.warns("cannot resolve")?;
    scene.reaches_at_once("2")?;
    let before = scene.dns.asked("a.test");
    let begun = Instant::now();
    scene.is_asked(NAME, 2)?;
    let asked = scene.dns.asked("a.test") - before;
    ensure!(asked < 100, "{asked} questions in {:?}", begun.elapsed());
    aliases(&scene.dns, &chain)?;
    scene.reaches("1")
}

#[test]
fn all_addresses_of_a_headless_service_take_their_turns() -> Result<()> {
    const GREETINGS: [&str; 20] = [
        "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r",
        "s", "t",
    ];
    let pod = pod!();
    let port = pod.inside.port()?;
    let ips: Vec<IpAddr> = (0..20).map(|n| IpAddr::from([127, 0, 3, n + 1])).collect();
    let echos = ips.iter().zip(GREETINGS).map(|(ip, greeting)| echo(&pod, *ip, port, greeting));
    let _echos = echos.collect::<Result<Vec<_>>>()?;
    let scene = Scene::new(pod, |dns| dns.knows(NAME, 0, &ips), &endpoint(port))?;
    let tally = |connections: usize| {
        let mut tally: BTreeMap<_, usize> = BTreeMap::new();
        for _ in 0..connections {
            *tally.entry(scene.greeting()?).or_default() += 1;
        }
        anyhow::Ok(tally)
    };
    scene.reaches("t")?;
    let reached = tally(60)?;
    ensure!(reached.len() == 20 && reached.values().all(|it| *it == 3), "{reached:?}");
    scene.dns.knows(NAME, 0, &ips[15..])?;
    until_true("the fifteen that left to be left", || {
        Ok(tally(5)?.into_keys().eq(["p", "q", "r", "s", "t"]))
    })
}

#[test]
fn names_of_a_profile_that_is_not_in_force_are_never_asked_for() -> Result<()> {
    let pod = pod!();
    let port = pod.inside.port()?;
    let _echo = echo(&pod, ONE, port, "1")?;
    let upstream = format!(
        "profiles: {{ dev: '{NAME}:{port}', prod: 'prod.test:{port}' }}, dns: {{ max_ttl: 1s }}"
    );
    let script = |dns: &ScriptedDns| {
        dns.knows("prod.test", 0, &[TWO.into()])?;
        dns.knows(NAME, 0, &[ONE.into()])
    };
    let environment = "environment: { from: ['file:/nowhere'], default: dev }";
    let scene = Scene::with(pod, script, &upstream, environment, Launch::new)?;
    scene.reaches("1")?;
    scene.ambassador.command(&["reload"])?.success()?;
    scene.is_asked(NAME, 2)?;
    ensure!(scene.dns.asked("prod.test") == 0, "prod was asked for");
    Ok(())
}

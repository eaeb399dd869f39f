//! Names that nobody answers for, or nobody knows: no connection waits for them, or ends, while another endpoint is
//! known.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hickory_proto::rr::RecordType;

use ambassador_tests::pod::Pod;
use ambassador_tests::server::scripted_dns::{Reply, ScriptedDns};
use ambassador_tests::wait::until_true;
use ambassador_tests::way::Way;
use ambassador_tests::{needs, pod};

use crate::{AT_ONCE, NAME, ONE, Scene, TWO, echo};

/// How long a connection waits for a name that may still be answered for.
const PATIENCE: Duration = Duration::from_millis(500);

fn silent(dns: &ScriptedDns) {
    dns.says_of_addresses(NAME, &Reply::Silence);
}

fn goes_on_without(pod: Pod, way: Way) -> Result<()> {
    let port = pod.inside.port()?;
    let _echos = [echo(&pod, ONE, port, "1")?, echo(&pod, TWO, port, "2")?];
    let upstream = format!(
        "endpoints: ['{NAME}:{port}', '{TWO}:{port}'], connect: {{ timeout: 20s, attempts: 1 }}, \
         dns: {{ min_ttl: 200ms, max_ttl: 400ms }}"
    );
    let script = |dns: &ScriptedDns| {
        silent(dns);
        Ok(())
    };
    let scene = Scene::with(pod, script, &upstream, "", |place| way.launch(place))?;
    // The name is silent for two seconds before that counts for an answer.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1500) {
        if begun.elapsed() < PATIENCE {
            // What it waits for the name takes nothing from its one attempt.
            let greeting = scene.greeting()?;
            ensure!(greeting == "2", "{greeting}");
            ensure!(begun.elapsed() < PATIENCE + AT_ONCE, "it took {:?}", begun.elapsed());
        } else {
            scene.reaches_at_once("2")?;
        }
    }
    scene.dns.says_of_addresses(NAME, &Reply::NoSuchName);
    until_true("no such name", || Ok(scene.known()?.contains("does not resolve")))?;
    scene.reaches_at_once("2")?;
    scene.dns.knows(NAME, 0, &[ONE.into()])?;
    scene.reaches("1")
}

#[test]
fn a_silent_name_holds_up_no_connection_on_splice() -> Result<()> {
    goes_on_without(pod!(), Way::Splice)
}

#[test]
fn a_silent_name_holds_up_no_connection_on_copy() -> Result<()> {
    goes_on_without(pod!(), Way::Copy)
}

#[test]
fn a_silent_name_holds_up_no_connection_on_sockmap() -> Result<()> {
    needs!(Sockmap);
    goes_on_without(pod!(), Way::Sockmap)
}

#[test]
fn a_silent_name_holds_up_no_connection_on_direct() -> Result<()> {
    needs!(Direct);
    goes_on_without(pod!(), Way::Direct)
}

#[test]
fn a_connection_that_waits_for_a_silent_name_takes_what_becomes_known_elsewhere() -> Result<()> {
    const OTHER: &str = "other.test";
    let pod = pod!();
    let port = pod.inside.port()?;
    let _echo = echo(&pod, TWO, port, "2")?;
    let upstream =
        format!("endpoints: ['{NAME}:{port}', '{OTHER}:{port}'], connect: {{ timeout: 20s }}");
    let script = |dns: &ScriptedDns| {
        silent(dns);
        dns.lags(RecordType::A, Duration::from_millis(900));
        dns.knows(OTHER, 60, &[TWO.into()])
    };
    let begun = Instant::now();
    let scene = Scene::with(pod, script, &upstream, "", |place| Way::Splice.launch(place))?;
    let greeting = scene.greeting()?;
    ensure!(greeting == "2", "{greeting}");
    // Silence is given up after two seconds.
    ensure!(scene.known()? == "not resolved yet", "{}", begun.elapsed().as_millis());
    Ok(())
}

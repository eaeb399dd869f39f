//! What the doctor says of the kernel tiers beside whether they work, and how soon: people wait for it.

use std::process::Command;
use std::time::{Duration, Instant};

use ambassador_tests::ambassador;
use ambassador_tests::cgroup;
use ambassador_tests::place::Place;
use ambassador_tests::pod::is_root;
use ambassador_tests::process::run;
use ambassador_tests::wait::SOON;
use ambassador_tests::{needs, pod};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::USER;

const PATIENCE: Duration = Duration::from_secs(2);
/// Others use the machine too.
const TRIES: u32 = 3;

#[test]
fn the_doctor_with_privileges_is_soon_done() -> Result<()> {
    needs!(Direct);
    is_soon_done(&[])
}

#[test]
fn the_doctor_without_privileges_is_soon_done() -> Result<()> {
    if !is_root() {
        return is_soon_done(&[]);
    }
    let id = USER.to_string();
    is_soon_done(&["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups"])
}

#[test]
fn the_doctor_tells_what_clients_of_sockmap_can_notice() -> Result<()> {
    needs!(Sockmap);
    let told = examined(&Place::here(), &[])?;
    let sockmap =
        told["tiers"].as_array().and_then(|tiers| tiers.get(1)).context("find sockmap")?;
    let facts: Vec<_> = told["facts"].as_array().into_iter().flatten().collect();
    ensure!(facts.iter().all(|it| it["tier"] == "sockmap"), "{facts:?}");
    let found = facts.iter().map(|it| (it["fact"].as_str(), it["holds"].as_bool()));
    let counts = sockmap["note"].is_null();
    let expected = [
        ("FIONREAD counts what waits for a client", counts),
        // On all kernels there have been; `app` has it of the ambassador.
        ("a blocking read waits until there is something", false),
        ("MSG_ZEROCOPY is completed", false),
    ];
    let expected_of_json = expected.map(|(fact, holds)| (Some(fact), Some(holds)));
    ensure!(found.eq(expected_of_json), "{facts:?}");

    let mut doctor = ambassador::command(&Place::here())?;
    let text = run(doctor.args(["doctor", "--cgroup"]).arg(cgroup::of_this_process()?), SOON)?;
    for (fact, holds) in expected {
        let line = format!("  fact    {fact}: {}\n", if holds { "yes" } else { "no" });
        ensure!(text.contains(&line), "{text}");
    }
    Ok(())
}

#[test]
fn a_pod_without_ipv6_skips_what_takes_it() -> Result<()> {
    needs!(Direct);
    let pod = pod!();
    let off = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6";
    run(pod.inside.command("sh").args(["-c", off]), SOON)?;
    let told = examined(&pod.inside, &[])?;
    let skipped = [
        "an IPv6 app is redirected, and sees what it asked for",
        "an IPv6-only socket is not led to IPv4",
    ];
    works_without(&told, &skipped, "there is no IPv6 here: ")
}

#[test]
fn without_the_right_to_look_into_sockets_nobody_is_said_to_have_reset() -> Result<()> {
    needs!(Direct);
    let caps = ["setpriv", "--inh-caps=-all", "--bounding-set=-all,+bpf,+net_admin", "--"];
    let told = examined(&Place::here(), &caps)?;
    works_without(&told, &["it is told whose a reset was"], "it is not known: that takes CAP_PERF")
}

/// What the doctor says of the cgroup of this process, started in a place by another program, if any.
fn examined(place: &Place, wrapper: &[&str]) -> Result<Value> {
    let binary = ambassador::binary()?.to_str().context("read the binary's path")?;
    let words = [wrapper, &[binary, "doctor", "--json", "--cgroup"]].concat();
    let mut doctor = place.command(words[0]);
    let told = run(doctor.args(&words[1..]).arg(cgroup::of_this_process()?), SOON)?;
    serde_json::from_str(&told).context("parse what doctor says")
}

/// Expects that all checks of `direct` have passed but these, which were skipped for a reason that begins so.
fn works_without(told: &Value, skipped: &[&str], why: &str) -> Result<()> {
    ensure!(told["tiers"][0]["tier"] == "direct" && told["tiers"][0]["works"] == true, "{told}");
    let checks: Vec<_> = told["checks"].as_array().into_iter().flatten().collect();
    let (passed, others): (Vec<_>, Vec<_>) = checks
        .into_iter()
        .filter(|it| it["tier"] == "direct")
        .partition(|check| check["passed"] == true);
    let names = others.iter().filter_map(|check| check["check"].as_str());
    ensure!(names.eq(skipped.iter().copied()) && passed.len() > skipped.len(), "{others:?}");
    let as_said = |check: &&Value| {
        let detail = check["detail"].as_str().unwrap_or_default();
        check["passed"].is_null() && detail.starts_with(why)
    };
    ensure!(others.iter().all(as_said), "{others:?}");
    Ok(())
}

/// Expects it of the doctor, started by another program that replaces itself by what follows it, if any.
fn is_soon_done(wrapper: &[&str]) -> Result<()> {
    let binary = ambassador::binary()?.to_str().context("read the binary's path")?;
    let cgroup = cgroup::of_this_process().ok().map(|path| format!("--cgroup={}", path.display()));
    let mut words = [wrapper, &[binary, "doctor", "--json"][..]].concat();
    words.extend(cgroup.as_deref());
    let mut taken = Vec::new();
    for _ in 0..TRIES {
        let began = Instant::now();
        let told = run(Command::new(words[0]).args(&words[1..]), SOON)?;
        taken.push(began.elapsed());
        let told: Value = serde_json::from_str(&told).context("parse what doctor says")?;
        ensure!(told["tiers"].as_array().is_some_and(|tiers| tiers.len() == 4), "{told}");
        if taken.last().is_some_and(|last| *last < PATIENCE) {
            return Ok(());
        }
    }
    bail!("it took {taken:?}")
}

//! `ambassador bench`: what it measures where, what it says of a route, and that it leaves nothing behind. How
//! fast anything is decides no test.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador;
use ambassador_tests::cgroup::{self, Cgroup};
use ambassador_tests::echo::Echo;
use ambassador_tests::needs;
use ambassador_tests::place::{BPFFS, Place};
use ambassador_tests::pod::is_root;
use ambassador_tests::process::{Finished, Process};
use ambassador_tests::wait::until;
use ambassador_tests::way::Way;
use anyhow::{Context, Result, ensure};
use serde_json::Value;

const BAD_CONFIG: i32 = 78;
/// At least one round is done, however long that takes on a busy machine.
const IN_TIME: Duration = Duration::from_secs(60);
/// Each of these loads goes through each way.
const LOADS: usize = 5;

#[test]
fn without_privileges_the_others_are_named_with_the_reason() -> Result<()> {
    let mut command = if is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--inh-caps=-all", "--bounding-set=-all", "--"]).arg(ambassador::binary()?);
        command
    } else {
        ambassador::command(&Place::here())?
    };
    let report = json(finish(command.args(["bench", "--json", "--time", "1s"]))?)?;
    all_measured(&report, &["no proxy", "splice", "copy"])?;
    for tier in ["direct", "sockmap"] {
        let missing = report["missing"].as_array().context("find what is missing")?;
        let why = missing.iter().find(|it| it["tier"] == tier).context("find the tier")?;
        let why = why["reason"].as_str().unwrap_or_default();
        ensure!(why.starts_with("not permitted to load programs; grant CAP_"), "{why}");
    }
    ensure!(report["tier"] == "splice" && report["route"] == Value::Null, "{report}");
    Ok(())
}

#[test]
fn people_get_a_table_and_a_recommendation() -> Result<()> {
    let finished = finish(ambassador::command(&Place::here())?.args(["bench", "--time", "1s"]))?;
    ensure!(finished.stderr.starts_with("ambassador: measuring no proxy, "), "{}", finished.stderr);
    let text = finished.success()?;
    for words in
        ["| no proxy |", "| upload: GB/s", "\nA plain route is carried by ", "\nRecommended: "]
    {
        let spaces = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        ensure!(spaces(&text).contains(spaces(words).as_str()), "no {words:?} in {text}");
    }
    Ok(())
}

#[test]
fn every_tier_is_measured_beside_an_ambassador_that_is_left_alone() -> Result<()> {
    needs!(Direct);
    needs!(Sockmap);
    let place = Place::here().with_bpffs()?;
    let echo = Echo::new(Family::Tcp)?;
    let port = place.port()?;
    let route = format!("{port}={}", echo.address());
    let running = Way::Direct.launch(&place)?.route(&route).start()?;
    let address = Address::from(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let before = address.connect()?;
    before.ask(b"before", b"before")?;

    let mut command = ambassador::command(&place)?;
    // As in its container, where the environment has its routes.
    command.env("AMBASSADOR_ROUTE_0", &route);
    command.args(["bench", "--json", "--time", "2s", "--cgroup"]).arg(cgroup::of_this_process()?);
    let report = json(finish(&mut command)?)?;
    all_measured(&report, &["no proxy", "direct", "sockmap", "splice", "copy"])?;
    ensure!(report["missing"] == Value::Array(Vec::new()), "{report}");
    ensure!(report["tier"] == "direct", "{report}");

    before.ask(b"still carried", b"still carried")?;
    let after = address.connect()?;
    after.ask(b"after", b"after")?;
    let carried: Value = json(running.command(&["status", "--json"])?)?;
    ensure!(carried["routes"][0]["connections"] == 2, "{carried}");
    ensure!(carried["routes"][0]["tier"] == "direct", "{carried}");
    drop((before, after));
    running.end()?;
    nothing_is_pinned(&place)
}

#[test]
fn it_goes_to_the_cgroup_it_is_given_and_comes_back() -> Result<()> {
    needs!(Direct);
    let pod = Cgroup::new()?;
    let place = Place::here().with_bpffs()?;
    let mut command = ambassador::command(&place)?;
    command.args(["bench", "--json", "--time", "1s", "--cgroup"]).arg(pod.path());
    let report = json(finish(&mut command)?)?;
    all_measured(&report, &["direct", "copy"])?;
    // Past an ambassador, which has next to nothing to do, and not through its listener.
    let cost = |way: &str| report["loads"][2]["ways"][way]["cpu_seconds"].as_f64();
    let (direct, copy) = cost("direct").zip(cost("copy")).context("find what it cost")?;
    ensure!(direct < copy / 10.0, "{direct} s/GB by direct, {copy} by copy");
    ensure!(members(pod.path())?.is_empty(), "somebody is left in the cgroup");
    ensure!(!has_children(pod.path())?, "a cgroup is left below");
    Ok(())
}

#[test]
fn the_recommendation_is_for_the_route_that_is_named() -> Result<()> {
    let file = orders_db("tier: copy")?;
    let mut command = ambassador::command(&Place::here())?;
    command.args(["bench", "--json", "--time", "1s", "--route", "orders-db", "--config"]);
    let report = json(finish(command.arg(file.path()))?)?;
    ensure!(report["route"] == "orders-db" && report["tier"] == "copy", "{report}");
    let why = report["why_not"].as_array().context("find why no higher tier")?;
    let why: Vec<_> = why.iter().map(|it| it["reason"].as_str().unwrap_or_default()).collect();
    ensure!(why == ["not allowed (tier: copy)"; 3], "{why:?}");
    let said = &report["advice"]["comparisons"][0];
    ensure!(said == "Route orders-db is carried by copy here.", "{said}");
    Ok(())
}

#[test]
fn a_route_can_be_asked_about_before_it_is_configured() -> Result<()> {
    let mut command = ambassador::command(&Place::here())?;
    command.args([
        "bench",
        "--json",
        "--time",
        "1s",
        "--route",
        "logs:unix:/run/log.sock=logs:24224",
    ]);
    let report = json(finish(&mut command)?)?;
    ensure!(report["route"] == "logs" && report["tier"] == "splice", "{report}");
    Ok(())
}

#[test]
fn an_unknown_route_is_told_with_the_nearest() -> Result<()> {
    let file = orders_db("tier: auto")?;
    let mut command = ambassador::command(&Place::here())?;
    command.args(["bench", "--route", "orders-bd", "--config"]).arg(file.path());
    let finished = finish(&mut command)?;
    ensure!(finished.code() == Some(BAD_CONFIG), "{}", finished.status);
    let said =
        "ambassador: --route: there is no route \"orders-bd\", did you mean \"orders-db\"?\n";
    ensure!(finished.stderr == said, "{}", finished.stderr);
    Ok(())
}

#[test]
fn an_interrupt_leaves_nothing_behind() -> Result<()> {
    let pod = if is_root() { Some(Cgroup::new()?) } else { None };
    let place = if is_root() { Place::here().with_bpffs()? } else { Place::here() };
    let bench = long_one(&place, pod.as_ref().map(Cgroup::path))?;
    let ambassadors = ambassadors_of(&bench)?;
    // One that does not end when it is told to.
    finish(Command::new("kill").args(["-STOP", &ambassadors[0]]))?.success()?;
    bench.signal(libc::SIGINT)?;
    let finished = bench.finish(IN_TIME)?;
    ensure!(finished.code() == Some(1), "{}", finished.status);
    ensure!(finished.stderr.ends_with("ambassador: interrupted\n"), "{}", finished.stderr);
    // It waits for them before it ends.
    ensure!(ambassadors.iter().all(|it| is_gone(it)), "one of {ambassadors:?} is left");
    if let Some(pod) = &pod {
        ensure!(!has_children(pod.path())?, "a cgroup is left below");
        nothing_is_pinned(&place)?;
    }
    Ok(())
}

#[test]
fn killed_it_takes_its_ambassadors_along() -> Result<()> {
    let bench = long_one(&Place::here(), None)?;
    let ambassadors = ambassadors_of(&bench)?;
    bench.signal(libc::SIGKILL)?;
    until("the end of its ambassadors", IN_TIME, || {
        Ok(ambassadors.iter().all(|it| is_gone(it)).then_some(()))
    })
}

/// One that would take a minute, and that has begun.
fn long_one(place: &Place, cgroup: Option<&Path>) -> Result<Process> {
    let mut command = ambassador::command(place)?;
    command.args(["bench", "--time", "60s"]);
    if let Some(cgroup) = cgroup {
        command.arg("--cgroup").arg(cgroup);
    }
    let mut bench = Process::start(&mut command)?;
    until("the beginning of the measurement", IN_TIME, || {
        bench.still_runs()?;
        Ok(bench.stderr().contains("measuring").then_some(()))
    })?;
    Ok(bench)
}

/// Those that it has started.
fn ambassadors_of(bench: &Process) -> Result<Vec<String>> {
    let path = format!("/proc/{0}/task/{0}/children", bench.id());
    let children = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let children: Vec<_> = children.split_whitespace().map(str::to_owned).collect();
    ensure!(children.len() >= 2, "it has only started {children:?}");
    Ok(children)
}

/// A process that nobody has waited for yet is gone too.
fn is_gone(process: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.is_empty() || stat.contains(") Z ")
}

fn orders_db(policy: &str) -> Result<tempfile::NamedTempFile> {
    let file = tempfile::Builder::new().suffix(".yaml").tempfile().context("make a file")?;
    let text = format!(
        "version: 1
routes: [{{ name: orders-db, listen: '127.0.0.1:5432', upstream: u, {policy} }}]
upstreams: {{ u: {{ endpoints: ['db:5432'] }} }}
"
    );
    fs::write(file.path(), text).context("write a configuration")?;
    Ok(file)
}

/// Every load has a figure on each of these ways.
fn all_measured(report: &Value, ways: &[&str]) -> Result<()> {
    let loads = report["loads"].as_array().context("find the loads")?;
    ensure!(loads.len() == LOADS, "{report}");
    for (load, way) in loads.iter().flat_map(|load| ways.iter().map(move |way| (load, way))) {
        let rate = load["ways"][way]["rate"].as_f64();
        ensure!(rate.is_some_and(|rate| rate > 0.0), "{} by {way}: {report}", load["load"]);
    }
    ensure!(report["rounds"].as_u64() >= Some(1), "{report}");
    Ok(())
}

fn members(cgroup: &Path) -> Result<String> {
    fs::read_to_string(cgroup.join("cgroup.procs")).context("read the members of a cgroup")
}

fn has_children(cgroup: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(cgroup).context("list a cgroup")?.flatten();
    Ok(entries.any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())))
}

/// Ambassadors pin in a directory that goes with the last of them.
fn nothing_is_pinned(place: &Place) -> Result<()> {
    let pinned = finish(place.command("ls").arg(BPFFS))?.success()?;
    ensure!(!pinned.lines().any(|name| name == "ambassador"), "it left pins");
    Ok(())
}

fn finish(command: &mut Command) -> Result<Finished> {
    Process::start(command)?.finish(IN_TIME)
}

fn json(finished: Finished) -> Result<Value> {
    let text = finished.success()?;
    serde_json::from_str(&text).with_context(|| format!("parse {text:?}"))
}

//! The self-test of the kernel tiers says which part of them is missing, and finds nothing else wrong.

use std::fs::File;

use ambassador::datapath::programs::{Links, Maps, Programs};
use ambassador::datapath::selftest::{self, Check, Extent, Found, Outcome};
use ambassador_ebpf::direct::{CONNECT6, GETPEERNAME4, GETPEERNAME6, LIFECYCLE};
use ambassador_ebpf::sockmap::ENROL;
use ambassador_tests::address::Family;
use ambassador_tests::cgroup;
use ambassador_tests::way::Way;
use ambassador_tests::{needs, skip};
use anyhow::{Context, Result, ensure};

#[test]
fn a_hook_that_is_missing_fails_the_checks_that_take_it() -> Result<()> {
    needs!(Direct);
    if let Some(obstacle) = Way::Direct.obstacle(Family::Tcp6)? {
        skip!("{obstacle}");
    }
    let of_ipv6 = [
        "an IPv6 app is redirected, and sees what it asked for",
        "a v4-mapped address is redirected, and seen as asked for",
    ];
    let of_ends = ["bytes are counted and the end is told", "it is told whose a reset was"];
    for (hook, expected) in [
        (CONNECT6, &of_ipv6[..]),
        (GETPEERNAME6, &of_ipv6),
        (GETPEERNAME4, &["the app sees the address it asked for"]),
        (LIFECYCLE, &of_ends),
    ] {
        let scene = Scene::new(|links| links.to_cgroup.retain(|(name, _)| *name != hook))?;
        let found = scene.run(None)?;
        let failed = failed(&found.direct);
        ensure!(failed == expected, "without {hook} this failed: {failed:?}");
        let why = found.no_direct().context("direct is taken to work")?;
        ensure!(why.starts_with(&format!("the self-test failed: {}: ", expected[0])), "{why}");
    }
    Ok(())
}

#[test]
fn where_nobody_is_enrolled_all_checks_fail_that_take_an_enrolled_client() -> Result<()> {
    needs!(Sockmap);
    let scene = Scene::new(|links| links.to_cgroup.retain(|(name, _)| *name != ENROL))?;
    let found = scene.run(None)?;
    let checks = found.sockmap.as_deref().unwrap_or_default();
    let passed = checks.iter().filter(|check| matches!(check.outcome, Outcome::Passed));
    let passed: Vec<_> = passed.map(|check| check.name).collect();
    let expected = [
        "a blocking client is left alone",
        "a zero-copy client is left alone",
        "no client is enrolled once that is over",
    ];
    ensure!(passed == expected, "this passed: {passed:?}");
    ensure!(found.no_direct().is_none(), "{:?}", found.direct);
    Ok(())
}

#[test]
fn sockmap_that_is_left_out_is_detached_and_direct_goes_on() -> Result<()> {
    needs!(Sockmap);
    let scene = Scene::new(Links::leave_out_sockmap)?;
    let found = scene.run(None)?;
    let why = found.no_sockmap().context("sockmap is taken to work")?;
    ensure!(why.ends_with("its socket was not enrolled"), "{why}");
    ensure!(found.no_direct().is_none(), "{:?}", found.direct);
    Ok(())
}

#[test]
fn programs_that_stay_attached_when_they_are_detached_are_noticed() -> Result<()> {
    needs!(Sockmap);
    let scene = Scene::new(|_| ())?;
    // Links of nothing: those that there are stay.
    let found = scene.run(Some(Links::default()))?;
    let first =
        "the self-test failed: nothing is redirected once all is detached: it did not reach";
    ensure!(found.no_direct().is_some_and(|it| it.starts_with(first)), "{:?}", found.direct);
    let first = "the self-test failed: no client is enrolled once all is detached: its socket was";
    ensure!(found.no_sockmap().is_some_and(|it| it.starts_with(first)), "{:?}", found.sockmap);
    Ok(())
}

/// The kernel half, attached to the cgroup of this process.
struct Scene {
    programs: Programs,
    maps: Maps,
    _links: Links,
}

impl Scene {
    /// Without what a change takes away.
    fn new(change: impl FnOnce(&mut Links)) -> Result<Self> {
        let cgroup = File::open(cgroup::of_this_process()?).context("open the cgroup")?;
        let mut programs = Programs::load(1)?;
        let mut links = programs.attach(cgroup);
        let maps = programs.maps();
        change(&mut links);
        Ok(Self { programs, maps, _links: links })
    }

    /// What the self-test of the start finds. Links are to be dropped in the end.
    fn run(&self, links: Option<Links>) -> Result<Found> {
        let cgroup = cgroup::of_this_process()?;
        selftest::run(&self.maps, &self.programs, cgroup, Extent::START, links)
    }
}

fn failed(tried: &Result<Vec<Check>, String>) -> Vec<&'static str> {
    let failed = tried.iter().flatten().filter(|check| matches!(check.outcome, Outcome::Failed(_)));
    failed.map(|check| check.name).collect()
}

//! Configurations that cannot be put in force, and parts of them that take a restart.

use anyhow::{Context, Result, ensure};

use ambassador_tests::ambassador::Launch;
use ambassador_tests::echo::Echo;
use ambassador_tests::place::Place;
use ambassador_tests::wait::until_true;
use ambassador_tests::way::Way;

use crate::{config, loopback, names, reaches, refuses, route};

#[test]
fn what_is_refused_changes_nothing_and_is_told_with_its_place() -> Result<()> {
    let here = Place::here();
    let [a, b] = [Echo::greeting("a")?, Echo::greeting("b")?];
    let [one, two, three] = [loopback(&here)?, loopback(&here)?, loopback(&here)?];
    let good = config(&[route("one", &one, a.address())]);
    let ambassador = Way::Splice.launch(&here)?.config(&good)?.start()?;
    let taken = two.listen()?;
    let moved = [route("new", &three, b.address()), route("one", &two, b.address())];
    let require = format!("{}acceleration: {{ tier: copy, require: copy }}\n", config(&moved[..1]));
    for (text, code, why) in [
        (good.replace("listen", "lisen"), 78, "ambassador.yaml:3:18: routes[0].lisen: unknown key"),
        ("version: 1\n".to_owned(), 78, "there are none"),
        (config(&moved), 1, "in use"),
        (require.replace("require: copy", "require: direct"), 78, "and below is allowed"),
    ] {
        let refused = ambassador.reconfigure(&text)?;
        ensure!(refused.code() == Some(code), "{text}: {refused:?}");
        ensure!(refused.stderr.contains(why) && refused.stderr.lines().count() == 1, "{refused:?}");
        ensure!(names(&ambassador)? == ["one"]);
        reaches(&one, "a").context("what ran before runs on")?;
        let status = ambassador.status()?;
        let told = status["config"]["refused"]["why"].as_str().unwrap_or_default();
        ensure!(told.contains(why), "{status}");
        let shown = ambassador.command(&["status"])?.success()?;
        ensure!(shown.contains("config refused at "), "{shown}");
    }
    refuses(moved[0].listen).context("bound by what was refused")?;
    let count = |result| {
        ambassador
            .metrics()?
            .sum("ambassador_config_reloads_total", &[("result", result)])
            .context("find it")
    };
    ensure!(
        count("refused")? >= 4.0 && count("ok")? == 0.0,
        "{} {}",
        count("refused")?,
        count("ok")?
    );

    drop(taken);
    let good = config(&moved);
    let done = ambassador.reconfigure(&good)?.success()?;
    ensure!(count("ok")? == 1.0, "{done}");
    let status = ambassador.status()?;
    ensure!(status["config"]["refused"].is_null(), "{status}");
    let digest = status["config"]["sha256"].as_str().unwrap_or_default();
    let sum = ambassador_tests::process::run(
        std::process::Command::new("sha256sum").arg(ambassador.configuration()),
        ambassador_tests::wait::SOON,
    )?;
    ensure!(!digest.is_empty() && sum.starts_with(digest), "{digest} is not {sum}");
    reaches(&two, "b")?;
    ensure!(ambassador.command(&["reload"])?.success()?.contains("nothing has changed"));
    ensure!(count("unchanged")? >= 1.0);
    Ok(())
}

#[test]
fn what_takes_a_restart_stays_and_is_named() -> Result<()> {
    let here = Place::here();
    let echo = Echo::greeting("e")?;
    let [one, two] = [loopback(&here)?, loopback(&here)?];
    let first = config(&[route("one", &one, echo.address())]);
    let ambassador = Way::Splice.launch(&here)?.config(&first)?.start()?;
    let second = config(&[route("one", &two, echo.address())]);
    let text = format!("{second}acceleration: {{ stale_after: 30s, inflight_bytes: 65536 }}\n");
    let done = ambassador.reconfigure(&text)?.success()?;
    ensure!(done.contains("routes changed: one"), "{done}");
    reaches(&two, "e").context("all else is in force")?;
    for key in ["acceleration.stale_after", "acceleration.inflight_bytes"] {
        ensure!(done.contains(key), "{done}");
        let told = ambassador.log()?;
        let mut told = told.iter().map(ToString::to_string);
        ensure!(told.any(|line| line.contains(key) && line.contains("needs a restart")));
        let status = ambassador.status()?;
        ensure!(status["config"]["needs_restart"].to_string().contains(key), "{status}");
    }
    Ok(())
}

#[test]
fn a_drain_refuses() -> Result<()> {
    let here = Place::here();
    let echo = Echo::greeting("e")?;
    let [one, two] = [loopback(&here)?, loopback(&here)?];
    let first = config(&[route("one", &one, echo.address())]);
    let ambassador = Way::Splice.launch(&here)?.config(&first)?.start()?;
    let held = reaches(&one, "e")?;
    ambassador.command(&["drain"])?.success()?;
    ambassador.until_answers("/readyz", 503)?;
    let refused = ambassador.reconfigure(&config(&[route("two", &two, echo.address())]))?;
    ensure!(refused.code() == Some(1) && refused.stderr.contains("draining"), "{refused:?}");
    refuses(&two)?;
    ambassador.process.signal(libc::SIGHUP)?;
    held.ask(b"still here", b"still here")?;
    drop(held);
    ambassador.ends_with(0)
}

#[test]
fn without_a_file_there_is_nothing_new() -> Result<()> {
    let here = Place::here();
    let echo = Echo::greeting("e")?;
    let listen = loopback(&here)?;
    let launch = Launch::new(&here)?.route(format!("one:{listen}={}", echo.address()));
    let ambassador = launch.start()?;
    ensure!(ambassador.command(&["reload"])?.success()?.contains("nothing has changed"));
    ambassador.process.signal(libc::SIGHUP)?;
    until_true("the signal to be counted", || {
        let labels = [("result", "unchanged")];
        Ok(ambassador.metrics()?.sum("ambassador_config_reloads_total", &labels) == Some(2.0))
    })?;
    reaches(&listen, "e").map(drop)
}

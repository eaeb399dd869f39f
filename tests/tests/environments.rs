//! Profiles: each environment reaches its own upstream by one file, and none another's by accident.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::{self, Launch};
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::place::Place;
use ambassador_tests::process::{Finished, Process};
use ambassador_tests::wait::SOON;
use ambassador_tests::way::Way;

const BAD_CONFIG: i32 = 78;
const VARIABLE: &str = "AMBASSADOR_TESTS_APP_ENV";

/// Both services, both of which run, and the evidence that a Pod has of its environment.
struct Pod {
    directory: TempDir,
    route: Address,
    dev: Echo,
    prod: Echo,
    variable: String,
}

impl Pod {
    /// One where the variable has this value and the namespace this name, if any.
    fn new(variable: &str, namespace: &str) -> Result<Self> {
        let directory = tempfile::tempdir().context("create a directory")?;
        let route = SocketAddr::from((Ipv4Addr::LOCALHOST, Place::here().port()?)).into();
        let [dev, prod] = [Echo::greeting("d")?, Echo::greeting("p")?];
        let variable = format!("{VARIABLE}={variable}");
        let pod = Self { directory, route, dev, prod, variable };
        if !namespace.is_empty() {
            pod.is_in(namespace)?;
        }
        Ok(pod)
    }

    fn namespace(&self) -> PathBuf {
        self.directory.path().join("namespace")
    }

    fn is_in(&self, namespace: &str) -> Result<()> {
        std::fs::write(self.namespace(), namespace).context("write the namespace")
    }

    /// The one file of all environments; more is said of the environment.
    fn config(&self, more: &str) -> String {
        let namespace = self.namespace();
        format!(
            "version: 1
environment: {{ from: ['env:{VARIABLE}', 'namespace-suffix:{}']{more} }}
routes: [{{ name: db, listen: '{}', upstream: db }}]
upstreams: {{ db: {{ profiles: {{ dev: '{}', prod: '{}' }} }} }}
",
            namespace.display(),
            self.route,
            self.dev.address(),
            self.prod.address(),
        )
    }

    fn launch(&self, launch: Launch, more: &str) -> Result<Launch> {
        launch.under(&["env", &self.variable]).config(&self.config(more))
    }

    /// What `check` says of the file there.
    fn check(&self, more: &str) -> Result<Finished> {
        let file = self.directory.path().join("checked.yaml");
        std::fs::write(&file, self.config(more)).context("write a configuration")?;
        let mut command = ambassador::command(&Place::here())?;
        let (name, value) = self.variable.split_once('=').unwrap_or_default();
        Process::start(command.arg("check").arg(file).env(name, value))?.finish(SOON)
    }
}

#[test]
fn a_dev_pod_cannot_reach_prod_by_accident() -> Result<()> {
    for way in Way::proxied()? {
        for (variable, namespace, why) in [
            ("dev", "orders-dev", "all of it says dev"),
            ("dev", "", "one of it says dev"),
            ("", "", "there is none"),
            ("dev", "orders-prod", "it does not agree"),
            ("prod", "orders-dev", "it does not agree"),
            ("production", "", "it is unknown"),
            ("", "orders-nonprod", "it only looks like prod"),
            ("", "orders-pre-prod", "it only looks like prod"),
            ("prod", "orders", "half of it is unknown"),
        ] {
            let what = format!("{way}: {variable:?}, {namespace:?}: {why}");
            let pod = Pod::new(variable, namespace)?;
            let launch = pod.launch(way.launch(&Place::here())?, ", default: dev")?;
            let _ambassador = launch.start().context(what.clone())?;
            let (greeting, _client) = greeted(&pod.route, 1)?;
            ensure!(greeting == "d", "{what}: {greeting}");
            ensure!(pod.prod.accepted() == 0, "{what}: it has reached prod");
        }
    }
    Ok(())
}

#[test]
fn without_a_default_doubt_keeps_it_from_starting() -> Result<()> {
    for (variable, namespace, told) in [
        ("", "", "have it say one of dev, prod"),
        ("dev", "orders-prod", "do not agree"),
        ("prod", "orders-dev", "do not agree"),
        ("production", "", "none of dev, prod"),
        ("", "orders-nonprod", "none of dev, prod"),
        ("prod", "orders", "none of dev, prod"),
    ] {
        let pod = Pod::new(variable, namespace)?;
        let ambassador = pod.launch(Launch::new(&Place::here())?, "")?.spawn()?;
        let finished = ambassador.process.finish(SOON)?;
        ensure!(finished.code() == Some(BAD_CONFIG), "{}", finished.status);
        ensure!(finished.stderr.contains(told), "{}", finished.stderr);
        ensure!(pod.dev.accepted() + pod.prod.accepted() == 0);
        let checked = pod.check("")?;
        ensure!(checked.code() == Some(BAD_CONFIG), "{}", checked.status);
        ensure!(checked.stderr.contains(told), "{}", checked.stderr);
    }
    Ok(())
}

#[test]
fn the_profile_in_force_is_told_with_its_evidence() -> Result<()> {
    let pod = Pod::new("prod", "orders-prod\n")?;
    let ambassador = pod.launch(Launch::new(&Place::here())?, ", default: dev")?.start()?;
    let (greeting, _client) = greeted(&pod.route, 1)?;
    ensure!(greeting == "p" && pod.dev.accepted() == 0, "{greeting}");

    let namespace = pod.namespace();
    let evidence = format!(
        "env:{VARIABLE} is \"prod\" and namespace-suffix:{} is \"orders-prod\"",
        namespace.display()
    );
    let status = ambassador.status()?;
    ensure!(status["config"]["profile"]["name"] == "prod", "{status}");
    ensure!(status["config"]["profile"]["evidence"] == *evidence, "{status}");
    let line = format!("profile prod: {evidence}");
    let text = ambassador.command(&["status"])?.success()?;
    ensure!(text.lines().any(|it| it == line), "{text}");
    let said = ambassador.log()?.into_iter().filter(|it| it["message"] == *line);
    ensure!(said.count() == 1, "{}", ambassador.process.stderr());
    let checked = pod.check("")?.success()?;
    ensure!(checked.contains("prod ") && checked.contains(&evidence), "{checked}");
    ensure!(checked.contains(&pod.prod.address().to_string()), "{checked}");
    ensure!(!checked.contains(&pod.dev.address().to_string()), "{checked}");
    Ok(())
}

#[test]
fn a_reload_looks_at_the_evidence_again() -> Result<()> {
    for way in Way::proxied()? {
        let pod = Pod::new("", "orders-dev")?;
        let ambassador = pod.launch(way.launch(&Place::here())?, "")?.start()?;
        let (greeting, held) = greeted(&pod.route, 1)?;
        ensure!(greeting == "d", "{way}: {greeting}");

        pod.is_in("orders-prod")?;
        let told = ambassador.command(&["reload"])?.success()?;
        ensure!(told.contains("routes changed: db; settings changed: environment"), "{told}");
        ensure!(greeted(&pod.route, 1)?.0 == "p", "{way}");
        let said = ambassador.log()?.into_iter().filter(|it| {
            it["message"].as_str().is_some_and(|message| message.starts_with("profile prod: "))
        });
        ensure!(said.count() == 1, "{}", ambassador.process.stderr());
        held.ask(b"still there?", b"still there?")?;

        pod.is_in("orders")?;
        let refused = ambassador.command(&["reload"])?;
        ensure!(refused.code() == Some(BAD_CONFIG), "{}", refused.status);
        ensure!(refused.stderr.contains("none of dev, prod"), "{}", refused.stderr);
        ensure!(greeted(&pod.route, 1)?.0 == "p", "{way}");
        let status = ambassador.status()?;
        ensure!(status["config"]["profile"]["name"] == "prod", "{status}");
        ensure!(!status["config"]["refused"].is_null(), "{status}");
    }
    Ok(())
}

//! The Pods of deploy/examples: each app reaches the services that its manifest names, at the address where it
//! believes them.

use std::path::Path;

use ambassador_tests::address::Address;
use ambassador_tests::podman::Podman;
use ambassador_tests::wait::until_true;
use anyhow::{Context, Result, ensure};

use crate::edit::{documents, text};
use crate::{AMBASSADOR, PORT, Scene, Services, ask, is_ready, manifest, podman_and_kubectl};

const DATABASE: &str = "database.svc.cluster.local";

#[test]
fn a_web_server_is_reached_by_a_proxy_on_a_low_port() -> Result<()> {
    let podman = podman_and_kubectl!();
    let pod = example(&podman, "tcp-proxy", &[("example.com", 80)])?;
    ask(&pod.played, "app", 81)?;
    pod.played.delete()
}

#[test]
fn a_service_on_another_port_is_reached() -> Result<()> {
    let podman = podman_and_kubectl!();
    let pod = example(&podman, "port-change", &[("backend", 8081)])?;
    ask(&pod.played, "app", 8080)?;
    pod.played.delete()
}

#[test]
fn one_container_stands_for_three_databases() -> Result<()> {
    let podman = podman_and_kubectl!();
    let [first, second] =
        ["postgres-0", "postgres-1"].map(|it| format!("{it}.postgres.{DATABASE}"));
    let [mysql, mongodb] = ["mysql", "mongos"].map(|it| format!("{it}.{DATABASE}"));
    let services: Services<'_> =
        &[(&first, 5432), (&second, 5432), (&mysql, 3306), (&mongodb, 27017)];
    let pod = example(&podman, "multi-database", services)?;
    for port in [5432, 3306, 27017] {
        ask(&pod.played, "app", port)?;
    }
    pod.played.delete()
}

#[test]
fn logs_go_to_the_standby_where_the_aggregator_does_not_answer() -> Result<()> {
    let podman = podman_and_kubectl!();
    // The other name is not known at all.
    let standby = ("fluentd-standby.logging.svc.cluster.local", 24224);
    let pod = example(&podman, "log-forwarder", &[standby])?;
    ask(&pod.played, "app", 24224)?;
    pod.played.delete()
}

#[test]
fn redis_is_reached_by_the_variable_of_the_image_that_is_replaced() -> Result<()> {
    let podman = podman_and_kubectl!();
    let [first, second] =
        ["redis-st-0", "redis-st-1"].map(|it| format!("{it}.redis-svc.default.svc.cluster.local"));
    let pod = example(&podman, "redis", &[(&first, 6379), (&second, 6379)])?;
    ask(&pod.played, "app", 6380)?;
    pod.played.delete()
}

#[test]
fn postgresql_is_reached_by_a_unix_socket() -> Result<()> {
    let podman = podman_and_kubectl!();
    let name = format!("postgres.{DATABASE}");
    let pod = example(&podman, "unix-socket", &[(&name, 5432)])?;
    // As the app's container sees it.
    let root = format!("/proc/{}/root", pod.played.pid("app")?);
    let socket = Address::Unix(Path::new(&root).join("var/run/db/postgres.sock"));
    socket.connect()?.ask(b"question", b"question")?;
    pod.played.delete()
}

#[test]
fn an_app_that_ends_may_still_open_connections() -> Result<()> {
    let podman = podman_and_kubectl!();
    let pod = example(&podman, "health-and-drain", &[("db.prod.svc.cluster.local", 5432)])?;
    let probe = ["/ambassador", "probe", "tcp", "db.prod.svc.cluster.local:5432"];
    pod.played.exec(AMBASSADOR, &probe)?.success().context("the readiness probe")?;
    pod.played.kill(AMBASSADOR, "TERM")?;
    until_true("the drain", || Ok(pod.played.logs(AMBASSADOR)?.contains("draining")))?;
    ask(&pod.played, "app", 5432).context("once the ambassador is told to end")?;
    pod.played.delete()
}

#[test]
fn a_job_ends_with_its_ambassador() -> Result<()> {
    let podman = podman_and_kubectl!();
    let pod = Scene::begin(&podman, &manifest("job")?, &[("db.prod.svc.cluster.local", 5432)])?;
    ensure!(pod.played.wait("migrate")? == 0, "{}", pod.played.logs("migrate")?);
    ensure!(pod.played.wait(AMBASSADOR)? == 0, "{}", pod.played.logs(AMBASSADOR)?);
    pod.played.delete()
}

#[test]
fn one_manifest_reaches_the_database_of_the_environment_it_is_applied_to() -> Result<()> {
    let podman = podman_and_kubectl!();
    let prod =
        ["postgres-0", "postgres-1"].map(|it| format!("{it}.postgres.prod.svc.cluster.local"));
    let dev = ("postgres.dev.svc.cluster.local", PORT);
    let prod = [(&*prod[0], PORT), (&*prod[1], PORT)];
    for (namespace, profile, known) in [
        ("orders-dev", "dev", &[dev][..]),
        ("orders-prod", "prod", &prod),
        ("orders", "dev", &[dev]),
    ] {
        let mut documents = documents(&manifest("environments")?)?;
        let pod = documents.iter_mut().find(|it| it["kind"] == "Pod").context("find the Pod")?;
        pod["metadata"]["namespace"] = namespace.into();
        // Of the other environments no name is known here.
        let scene = Scene::begin(&podman, &text(&documents), known)?;
        is_ready(&scene.played)?;
        scene.ask().context(namespace)?;
        let told = scene.status()?["config"]["profile"].clone();
        ensure!(told["name"] == profile, "{namespace}: {told}");
        ensure!(told["evidence"].to_string().contains(namespace), "{namespace}: {told}");
        scene.played.delete()?;
    }
    Ok(())
}

/// The Pod of an example, once it is ready.
fn example<'p>(podman: &'p Podman, name: &str, services: Services<'_>) -> Result<Scene<'p>> {
    let scene = Scene::begin(podman, &manifest(name)?, services)?;
    is_ready(&scene.played)?;
    Ok(scene)
}

//! A configuration that is mounted from a ConfigMap or a Secret and changes while the app is at work.

use ambassador_tests::podman::Podman;
use ambassador_tests::wait::{SOON, until_true};
use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::edit::{changed, documents, named, text};
use crate::{APP, DATABASES, ROUTE, Scene, ask, is_ready, overlay, podman_and_kubectl};

const VOLUME: &str = "ambassador-config";
const CACHE: (&str, u16) = ("cache.prod.svc.cluster.local", 6379);
/// The base's with a route more, and the one that was there led elsewhere.
const CHANGED: &str = "
version: 1
routes:
  - { name: orders-db, listen: 5432, upstream: orders-db }
  - { name: cache, listen: 6379, upstream: cache }
upstreams:
  orders-db: { endpoints: ['orders-db-1.prod.svc.cluster.local:5432'] }
  cache: { endpoints: ['cache.prod.svc.cluster.local:6379'] }
";
/// An app that asks one question after the other, each on a connection of its own, until it is told to end.
const QUESTIONS: &str = "while ! test -e /dev/shm/go; do \
     test \"$(printf question | nc 127.0.0.1 5432)\" = question || exit 1; printf .; done";
/// So many connections stay open all the while.
const KEPT: usize = 100;

#[test]
fn a_changed_config_map_drops_no_connection() -> Result<()> {
    let podman = podman_and_kubectl!();
    keeps_every_connection(&podman, &overlay("restricted")?)
}

#[test]
fn a_changed_secret_drops_no_connection() -> Result<()> {
    let podman = podman_and_kubectl!();
    let manifest = overlay("accelerated")?;
    let mut documents = documents(&manifest)?;
    let source = documents.iter_mut().find(|it| it["metadata"]["name"] == VOLUME);
    let source = source.context("find the ConfigMap")?;
    *source = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": source["metadata"], "stringData": source["data"],
    });
    let manifest = changed(&text(&documents), |pod| {
        let volume = named(&mut pod["volumes"], VOLUME)?;
        *volume = json!({ "name": VOLUME, "secret": { "secretName": VOLUME } });
        Ok(())
    })?;
    keeps_every_connection(&podman, &manifest)
}

/// Connections that are open when the configuration changes go on, and new ones are taken at any time.
fn keeps_every_connection(podman: &Podman, manifest: &str) -> Result<()> {
    let services = [DATABASES, &[CACHE]].concat();
    let scene = Scene::begin(podman, manifest, &services)?;
    is_ready(&scene.played)?;
    let connect = || (0..KEPT).map(|_| ROUTE.connect()).collect::<Result<Vec<_>>>();
    let kept = scene.played.inside.enter(connect)?;
    let go_on = || kept.iter().try_for_each(|it| it.ask(b"question", b"question"));
    go_on().context("before the change")?;
    let questions = scene.played.start(APP, &["sh", "-c", QUESTIONS])?;
    until_true("the app's first questions", || Ok(questions.stdout().len() > 2))?;
    ensure!(ask(&scene.played, APP, CACHE.1).is_err(), "the new route is there before it is made");

    scene.played.change(VOLUME, &[("config.yaml", CHANGED)])?;
    until_true("the new route", || Ok(ask(&scene.played, APP, CACHE.1).is_ok()))?;
    go_on().context("after the change")?;
    drop(kept);
    let answered = questions.stdout().len();
    until_true("more of the app's questions", || Ok(questions.stdout().len() > answered + 2))?;
    scene.played.exec(APP, &["touch", "/dev/shm/go"])?.success()?;
    questions.finish(SOON)?.success().context("the app's questions")?;
    scene.played.delete()
}

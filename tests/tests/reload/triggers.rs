//! What has the configuration read again: a signal, and the file, however it is replaced.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread::{scope, spawn};

use anyhow::{Context, Result, anyhow, ensure};

use ambassador_tests::address::Address;
use ambassador_tests::echo::Echo;
use ambassador_tests::place::Place;
use ambassador_tests::wait::until_true;
use ambassador_tests::way::Way;

use crate::{config, loopback, reaches, route};

/// Two servers that one route can lead to.
struct Scene {
    listen: Address,
    servers: [Echo; 2],
}

impl Scene {
    fn new() -> Result<Self> {
        let listen = loopback(&Place::here())?;
        Ok(Self { listen, servers: [Echo::greeting("a")?, Echo::greeting("b")?] })
    }

    fn config(&self, server: usize) -> String {
        config(&[route("one", &self.listen, self.servers[server].address())])
    }

    fn leads_to(&self, greeting: &str) -> Result<()> {
        until_true("the route to lead elsewhere", || Ok(reaches(&self.listen, greeting).is_ok()))
    }
}

#[test]
fn sighup_reads_it_again() -> Result<()> {
    let scene = Scene::new()?;
    let directory = tempfile::tempdir()?;
    // The directory that is watched is another than the file's: nobody but the signal tells.
    let (seen, hidden) = (directory.path().join("seen"), directory.path().join("hidden"));
    fs::create_dir(&seen)?;
    fs::create_dir(&hidden)?;
    fs::write(hidden.join("c.yaml"), scene.config(0))?;
    symlink(&hidden, seen.join("link"))?;
    let launch = Way::Splice.launch(&Place::here())?.flag("--config", seen.join("link/c.yaml"));
    let ambassador = launch.start()?;
    for (server, greeting) in [(1, "b"), (0, "a")] {
        fs::write(hidden.join("c.yaml"), scene.config(server))?;
        ambassador.process.signal(libc::SIGHUP)?;
        scene.leads_to(greeting)?;
    }
    ambassador.end()
}

#[test]
fn a_file_that_is_written_or_replaced_is_seen() -> Result<()> {
    let scene = Scene::new()?;
    let ambassador = Way::Splice.launch(&Place::here())?.config(&scene.config(0))?.start()?;
    let file = ambassador.configuration();
    fs::write(&file, scene.config(1))?;
    scene.leads_to("b").context("written in place")?;
    let draft = file.with_extension("tmp");
    fs::write(&draft, scene.config(0))?;
    fs::rename(&draft, &file)?;
    scene.leads_to("a").context("an editor's rename")?;

    fs::remove_file(&file)?;
    until_true("word that it is gone", || {
        let status = ambassador.status()?;
        Ok(status["config"]["refused"]["why"].to_string().contains("cannot be read"))
    })?;
    reaches(&scene.listen, "a").context("without the file")?;
    fs::write(&file, scene.config(1))?;
    scene.leads_to("b").context("there again")?;
    ambassador.end()
}

#[test]
fn a_config_map_s_swap_is_seen_and_nobody_is_disconnected() -> Result<()> {
    let scene = Scene::new()?;
    let volume = tempfile::tempdir()?;
    config_map(volume.path(), 1, &scene.config(0))?;
    symlink("..data/config.yaml", volume.path().join("config.yaml"))?;
    let file = volume.path().join("config.yaml");
    let ambassador = Way::Splice.launch(&Place::here())?.flag("--config", file).start()?;
    let held = reaches(&scene.listen, "a")?;
    for version in 2..6 {
        let server = (version + 1) % 2;
        config_map(volume.path(), version, &scene.config(server))?;
        // As the kubelet does, at its leisure.
        fs::remove_dir_all(volume.path().join(format!("..{}", version - 1)))?;
        scene.leads_to(["a", "b"][server])?;
        held.ask(b"still here", b"still here")?;
    }
    let refused = ambassador.metrics()?;
    let refused = refused.sum("ambassador_config_reloads_total", &[("result", "refused")]);
    ensure!(refused == Some(0.0), "{refused:?} were refused");
    drop(held);
    ambassador.end()
}

/// Publishes a version of a ConfigMap as the kubelet does: a directory, and a link that is renamed over the last.
fn config_map(volume: &Path, version: usize, text: &str) -> Result<()> {
    let data = format!("..{version}");
    fs::create_dir(volume.join(&data))?;
    fs::write(volume.join(&data).join("config.yaml"), text)?;
    symlink(&data, volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).context("swap the link")
}

#[test]
fn a_storm_of_triggers_is_a_few_reloads() -> Result<()> {
    let scene = Scene::new()?;
    let ambassador = Way::Splice.launch(&Place::here())?.config(&scene.config(0))?.start()?;
    fs::write(ambassador.configuration(), scene.config(1))?;
    let told = scope(|scope| {
        let asking: Vec<_> =
            (0..30).map(|_| scope.spawn(|| ambassador.command(&["reload"]))).collect();
        for _ in 0..1000 {
            ambassador.process.signal(libc::SIGHUP)?;
        }
        asking
            .into_iter()
            .map(|it| it.join().map_err(|_| anyhow!("it panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    for told in told {
        told.success()?;
    }
    reaches(&scene.listen, "b")?;
    let all = ambassador.metrics()?.sum("ambassador_config_reloads_total", &[]);
    ensure!(all.is_some_and(|all| all < 500.0), "{all:?} reloads");
    let done = spawn(move || ambassador.end());
    done.join().map_err(|_| anyhow!("it panicked"))?
}

//! The manifests of deploy/ as real Pods: what a platform engineer applies is what runs here, the images'
//! names aside.

mod config_map;
mod edit;
mod end;
mod examples;
mod limits;
mod modes;
mod surroundings;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;

use ambassador_tests::address::Address;
use ambassador_tests::echo::Echo;
use ambassador_tests::metrics::Metrics;
use ambassador_tests::podman::{Played, Podman};
use ambassador_tests::server::dnsmasq::Dnsmasq;
use ambassador_tests::wait::{SOON, until_true};
use ambassador_tests::{http, process};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The port of the route, on localhost and of the database.
const PORT: u16 = 5432;
/// Where the app believes its database.
const ROUTE: Address = Address::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), PORT));
/// Where every ambassador answers the kubelet.
const PROBES: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9090);
const AMBASSADOR: &str = "ambassador";
const APP: &str = "app";
/// The init container of mode `loader`.
const LOAD: &str = "ambassador-load";

/// The ports where the services of a manifest are, by the names that it gives them.
type Services<'a> = &'a [(&'a str, u16)];

/// Those of the overlays.
const DATABASES: Services<'_> =
    &[("orders-db-0.prod.svc.cluster.local", PORT), ("orders-db-1.prod.svc.cluster.local", PORT)];

/// A Pod that has begun, and the services that its manifest names.
struct Scene<'p> {
    played: Played<'p>,
    services: Vec<Echo>,
    _names: Dnsmasq,
}

impl<'p> Scene<'p> {
    /// Of an overlay, once it is ready.
    fn new(podman: &'p Podman, manifest: &str) -> Result<Self> {
        let scene = Self::begin(podman, manifest, DATABASES)?;
        is_ready(&scene.played)?;
        Ok(scene)
    }

    fn begin(podman: &'p Podman, manifest: &str, services: Services<'_>) -> Result<Self> {
        let played = podman.make(manifest)?;
        let upstream = &played.upstream;
        let names: Vec<_> =
            services.iter().map(|(name, _)| (*name, IpAddr::from(upstream.ipv4))).collect();
        let names = Dnsmasq::start(upstream, &names)?;
        let mut ports: Vec<_> = services.iter().map(|(_, port)| *port).collect();
        ports.dedup();
        let services = ports.into_iter().map(|port| {
            let address = Address::from(SocketAddr::from((upstream.ipv4, port)));
            Ok(Echo::on(upstream.enter(|| address.listen())?, ""))
        });
        let services = services.collect::<Result<_>>()?;
        played.begin()?;
        Ok(Self { played, services, _names: names })
    }

    /// The app asks its database, which it believes on localhost.
    fn ask(&self) -> Result<()> {
        ask(&self.played, APP, PORT)
    }

    fn status(&self) -> Result<Value> {
        let status =
            self.played.exec(AMBASSADOR, &["/ambassador", "status", "--json"])?.success()?;
        serde_json::from_str(&status).with_context(|| format!("read the status: {status}"))
    }

    /// The tier in force, and why.
    fn explained(&self) -> Result<String> {
        self.played.exec(AMBASSADOR, &["/ambassador", "explain"])?.success()
    }

    /// Waits until the metrics have bytes that a tier has carried, beyond so many.
    fn carries_by(&self, tier: &str, beyond: f64) -> Result<()> {
        until_true(&format!("bytes carried by {tier}"), || Ok(self.carried_by(tier)? > beyond))
            .with_context(|| self.explained().unwrap_or_default())
    }

    /// Bytes that a tier has carried, as the metrics have it.
    fn carried_by(&self, tier: &str) -> Result<f64> {
        let told = http::get(&self.played.inside, PROBES, "/metrics")?.body;
        let carried = Metrics::parse(&told)?.sum("ambassador_bytes_total", &[("tier", tier)]);
        Ok(carried.unwrap_or(0.0))
    }

    /// A line of a container's /proc/1/status.
    fn of_process(&self, container: &str, field: &str) -> Result<String> {
        let path = format!("/proc/{}/status", self.played.pid(container)?);
        let status = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        Ok(value.with_context(|| format!("find {field} in {path}"))?.trim().to_owned())
    }
}

/// Waits for what the kubelet waits for before it starts the app.
fn is_ready(played: &Played<'_>) -> Result<()> {
    until_true("a Pod that is ready", || {
        let answer = http::get(&played.inside, PROBES, "/readyz");
        Ok(answer.is_ok_and(|answer| answer.status == 200))
    })
    .with_context(|| played.logs(AMBASSADOR).unwrap_or_default())
}

/// An app asks who is, as it believes, on a port of localhost.
fn ask(played: &Played<'_>, app: &str, port: u16) -> Result<()> {
    let talk = format!("printf question | nc 127.0.0.1 {port}");
    let answer = played.exec(app, &["sh", "-c", &talk])?;
    ensure!(answer.stdout == "question", "the answer was {answer:?}; {}", played.logs(AMBASSADOR)?);
    Ok(())
}

/// What the node's bpffs holds for ambassadors.
fn pinned(podman: &Podman) -> Result<Vec<String>> {
    let found = podman.on_node("find", &["/sys/fs/bpf", "-mindepth", "2", "-type", "f"])?;
    Ok(found.lines().map(str::to_owned).collect())
}

/// What `kubectl apply -k` would apply.
fn overlay(mode: &str) -> Result<String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/overlays").join(mode);
    process::run(Command::new("kubectl").arg("kustomize").arg(directory), SOON)
}

/// A file of deploy/examples.
fn manifest(name: &str) -> Result<String> {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
    let path = examples.join(format!("{name}.yaml"));
    std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// Skips a test where overlays cannot be built, or no Pod can run.
#[macro_export]
macro_rules! podman_and_kubectl {
    () => {{
        ambassador_tests::installed!("kubectl", "dnsmasq");
        ambassador_tests::podman!()
    }};
}

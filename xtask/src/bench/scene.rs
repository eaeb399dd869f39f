//! Where it is measured: a pod and an upstream, each on a CPU of its own, joined by a cable if the
//! rights allow it.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use ambassador::bench::cpu::{self, Cpus};
use ambassador::bench::upstream::Upstream;
use ambassador_tests::place::Place;
use ambassador_tests::pod::{Pod, is_root};
use ambassador_tests::pool::Dialect;
use ambassador_tests::process::Process;
use ambassador_tests::server::postgres::Postgres;
use ambassador_tests::server::redis::Redis;
use anyhow::{Context, Result};

use super::catalogue::{Kind, Load, Service};
use super::failing::Failing;
use super::load::{Outcome, Scale, Target, checks, pgbench};
use super::subject::standby::Standby;
use super::subject::{Order, Subject};

/// Enough that a port has rested when it is used again.
const PORTS: usize = 64;
/// For what a load does not count itself.
const CONNECTIONS: usize = 64;

/// The two places and their CPUs.
pub(crate) struct Scene {
    pod: Pod,
    /// Where proxies can listen, and which of these is next.
    ports: Vec<u16>,
    next: AtomicUsize,
    /// Serves all that ask for it, because it takes seconds to make.
    postgres: Option<Postgres>,
    /// Where clients and proxies run, and where servers do.
    cpus: Cpus,
    /// What a reader of the figures must know about this scene.
    pub(crate) notes: Vec<String>,
}

impl Scene {
    /// Two network namespaces with root, the loopback without; ready for these loads.
    pub(crate) fn set(cpus: Cpus, loads: &[Load]) -> Result<Self> {
        let routes = loads.iter().map(|load| load.ports()).max().unwrap_or(1);
        let mut scene = if is_root() {
            let pod = Pod::new().context("make a pod and an upstream")?;
            for place in [&pod.inside, &pod.upstream] {
                place.enter(let_ports_be_used_again)?;
            }
            Self::of(pod, cpus, routes)?
        } else {
            Self::of(Pod::on_loopback(), cpus, routes)?
        };
        if !is_root() {
            let note = "skipped: the cable between pod and upstream, for network namespaces need root; \
                        all traffic stays on one loopback";
            scene.notes.push(note.into());
        }
        if loads.iter().any(|load| matches!(load.kind, Kind::Postgres { .. })) {
            scene.postgres = Some(scene.at_upstream(|place| {
                let postgres = Postgres::start(place)?;
                pgbench::prepare(postgres.address)?;
                Ok(postgres)
            })?);
        }
        Ok(scene)
    }

    /// Everything on the loopback, which needs no rights.
    pub(crate) fn on_loopback() -> Result<Self> {
        Self::of(Pod::on_loopback(), Cpus::choose()?, 1)
    }

    fn of(pod: Pod, cpus: Cpus, routes: usize) -> Result<Self> {
        let mut notes = Vec::new();
        if cpus.pod == cpus.upstream {
            notes.push("there is only one CPU: the upstream takes its time from the pod".into());
        }
        let ports = (0..PORTS.max(routes + 1)).map(|_| pod.inside.port()).collect::<Result<_>>()?;
        Ok(Self { pod, ports, next: AtomicUsize::new(0), postgres: None, cpus, notes })
    }

    /// Runs one load through one subject. Both are started for it and end with it, so that nothing
    /// carries over from one measurement to the next.
    pub(crate) fn measure(&self, subject: &Subject, load: Load, scale: Scale) -> Result<Outcome> {
        let run = |upstream| {
            let mut order = self.order(load.ports(), upstream, load.connections());
            order.checked = (load.kind == Kind::Checks).then_some(checks::INTERVAL);
            order.elsewhere = order.listen.split_off(load.routes).pop();
            self.through(subject, order, |target| load.run(&target, scale))
        };
        if let Kind::Failover { dialect, failure } = load.kind {
            let fail_over = |(process, primary), address| {
                let failing = Failing::new(failure, &self.pod.upstream, process, primary);
                self.fail_over(subject, load, scale, failing, Standby { address, dialect })
            };
            return match dialect {
                Dialect::Redis => {
                    let [primary, standby] = self.two(Redis::start)?;
                    fail_over((primary.process.id(), primary.address), standby.address)
                }
                Dialect::Postgres => {
                    let [primary, standby] = self.two(Postgres::start)?;
                    fail_over((primary.process.id(), primary.address), standby.address)
                }
            };
        }
        match load.service() {
            Service::BuiltIn => run(self.built_in()?.address()),
            Service::Redis => run(self.at_upstream(Redis::start)?.address),
            Service::Postgres => run(self.postgres.as_ref().context("find PostgreSQL")?.address),
        }
    }

    /// The same with a server that fails, and one that takes over.
    fn fail_over(
        &self,
        subject: &Subject,
        load: Load,
        scale: Scale,
        failing: Failing,
        standby: Standby,
    ) -> Result<Outcome> {
        let mut order = self.one_route(failing.address);
        order.standby = Some(standby);
        self.through(subject, order, |target| {
            let failing = Some(Arc::new((failing, standby.address)));
            load.run(&Target { failing, ..target }, scale)
        })
    }

    /// The built-in upstream, started.
    pub(crate) fn built_in(&self) -> Result<Upstream> {
        self.at_upstream(|place| Upstream::start(place.ipv4.into()))
    }

    /// What a proxy is to do here for one route and a few connections.
    pub(crate) fn one_route(&self, upstream: SocketAddr) -> Order {
        self.order(1, upstream, CONNECTIONS)
    }

    fn order(&self, routes: usize, upstream: SocketAddr, connections: usize) -> Order {
        let wanted = routes + 1;
        let first = self.next.fetch_add(wanted, Ordering::Relaxed) % self.ports.len();
        let ports = self.ports.iter().cycle().skip(first).take(wanted);
        let mut listen: Vec<_> =
            ports.map(|&port| SocketAddr::from((Ipv4Addr::LOCALHOST, port))).collect();
        let admin = listen.pop().expect("one more than there are routes");
        Order {
            listen,
            elsewhere: None,
            upstream,
            standby: None,
            checked: None,
            admin,
            connections,
        }
    }

    /// Does something that a client does, through one subject, at the pod.
    pub(crate) fn through<T: Send>(
        &self,
        subject: &Subject,
        order: Order,
        act: impl FnOnce(Target) -> Result<T> + Send,
    ) -> Result<T> {
        at(&self.pod.inside, self.cpus.pod, |_| {
            let mut way = subject.start(order)?;
            let target = Target {
                addresses: way.addresses.clone(),
                proxy: way.proxy.as_ref().map(Process::id),
                started: way.started,
                reload: way.reload.clone(),
                failing: None,
                cpus: self.cpus,
            };
            let done = act(target);
            if let Some(proxy) = &mut way.proxy {
                proxy.still_runs()?;
            }
            done
        })
    }

    /// Two servers of a kind, where the upstream is.
    fn two<S: Send>(&self, start: fn(&Place) -> Result<S>) -> Result<[S; 2]> {
        Ok([self.at_upstream(start)?, self.at_upstream(start)?])
    }

    /// Does something where the upstream is.
    fn at_upstream<T: Send>(&self, act: impl FnOnce(&Place) -> Result<T> + Send) -> Result<T> {
        at(&self.pod.upstream, self.cpus.upstream, act)
    }
}

/// A namespace has some 30,000 ports for its clients, and closed connections keep theirs for a minute:
/// connections that come and go quickly would run out of them.
fn let_ports_be_used_again() -> Result<()> {
    fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1").context("let ports be used again")
}

/// Does something on a thread in that place and on that CPU; threads and processes that it starts
/// stay there too.
fn at<T: Send>(
    place: &Place,
    cpu: usize,
    act: impl FnOnce(&Place) -> Result<T> + Send,
) -> Result<T> {
    thread::scope(|scope| {
        let pinned = scope.spawn(|| {
            cpu::pin(cpu)?;
            place.enter(|| act(place))
        });
        pinned.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

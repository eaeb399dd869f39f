//! Where it is measured: a pod and an upstream, each on a CPU of its own, joined by a cable if the
//! rights allow it.

use std::net::SocketAddr;
use std::thread;

use ambassador_tests::place::Place;
use ambassador_tests::pod::{Pod, is_root};
use ambassador_tests::process::Process;
use ambassador_tests::server::redis::Redis;
use anyhow::{Context, Result};

use super::cpu::{self, Cpus};
use super::load::{Load, Outcome, Scale, Target};
use super::subject::Subject;
use super::upstream::Upstream;

/// The two places and their CPUs.
pub(crate) struct Scene {
    pod: Pod,
    /// Where clients and proxies run, and where servers do.
    pub(crate) cpus: Cpus,
    /// What a reader of the figures must know about this scene.
    pub(crate) notes: Vec<String>,
}

impl Scene {
    /// Two network namespaces with root, the loopback without.
    pub(crate) fn set() -> Result<Self> {
        if is_root() {
            return Self::of(Pod::new().context("make a pod and an upstream")?, Vec::new());
        }
        let note = "skipped: the cable between pod and upstream, for network namespaces need root; \
                    all traffic stays on one loopback";
        Self::of(Pod::on_loopback(), vec![note.into()])
    }

    /// Everything on the loopback, which needs no rights.
    pub(crate) fn on_loopback() -> Result<Self> {
        Self::of(Pod::on_loopback(), Vec::new())
    }

    fn of(pod: Pod, mut notes: Vec<String>) -> Result<Self> {
        let cpus = Cpus::choose()?;
        if cpus.pod == cpus.upstream {
            notes.push("there is only one CPU: the upstream takes its time from the pod".into());
        }
        Ok(Self { pod, cpus, notes })
    }

    /// Runs one load through one subject. Both are started for it and end with it, so that nothing
    /// carries over from one measurement to the next.
    pub(crate) fn measure(&self, subject: &Subject, load: Load, scale: Scale) -> Result<Outcome> {
        if load.wants_redis() {
            let redis = self.at_upstream(Redis::start)?;
            self.through(subject, redis.address, |target| load.run(target, scale))
        } else {
            let upstream = self.at_upstream(|place| Upstream::start(place.ipv4.into()))?;
            self.through(subject, upstream.address(), |target| load.run(target, scale))
        }
    }

    /// Does something that a client does, through one subject, at the pod.
    pub(crate) fn through<T: Send>(
        &self,
        subject: &Subject,
        upstream: SocketAddr,
        act: impl FnOnce(Target) -> Result<T> + Send,
    ) -> Result<T> {
        at(&self.pod.inside, self.cpus.pod, |place| {
            let mut way = subject.start(place, upstream)?;
            let proxy = way.proxy.as_ref().map(Process::id);
            let done = act(Target { address: way.address, proxy, cpus: self.cpus });
            if let Some(proxy) = &mut way.proxy {
                proxy.still_runs()?;
            }
            done
        })
    }

    /// Does something where the upstream is.
    pub(crate) fn at_upstream<T: Send>(
        &self,
        act: impl FnOnce(&Place) -> Result<T> + Send,
    ) -> Result<T> {
        at(&self.pod.upstream, self.cpus.upstream, act)
    }
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

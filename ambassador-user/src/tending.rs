//! Finds out how hosts are: one task for each upstream of which one could be taken out.
//!
//! Where checks are configured, each host is asked again and again, whatever becomes of connections.
//! A host that connections speak against is tried by ourselves, so that it is soon clear whether it fails;
//! one that has been taken out is tried before connections go there again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::proxy::connect::{self, As};
use crate::upstream::health::STEPS;
use crate::upstream::host::Host;
use crate::upstream::{Endpoint, Upstream};
use crate::{config, probe};

/// Between two tries of a host that connections speak against.
const DOUBT: Duration = Duration::from_millis(200);
/// Within so long the first check begins.
const FIRST: Duration = Duration::from_secs(1);
/// Between two tries of a host while no other is sure to work, and of any ten of them.
const URGENT: Duration = Duration::from_millis(500);

/// Those who look after the upstreams in service.
#[derive(Debug, Default)]
pub struct Tending(HashMap<usize, Tender>);

#[derive(Debug)]
struct Tender {
    /// As long as it is here, nobody else has its address, which is the key.
    _of: Arc<Upstream>,
    task: AbortHandle,
}

impl Tending {
    /// From now on these upstreams are looked after, and no others.
    pub fn look_after<'u>(&mut self, upstreams: impl Iterator<Item = &'u Arc<Upstream>>) {
        let may_lose_one = |upstream: &&Arc<Upstream>| {
            let meant = upstream.meant();
            let alone = upstream.endpoints().len() == 1 && upstream.endpoints()[0].name().is_none();
            meant.health.is_some() || meant.eject.is_some() && !alone
        };
        let mut before = std::mem::take(&mut self.0);
        for upstream in upstreams.filter(may_lose_one) {
            let key = Arc::as_ptr(upstream).addr();
            if self.0.contains_key(&key) {
                continue;
            }
            let tender = before.remove(&key).unwrap_or_else(|| Tender {
                _of: Arc::clone(upstream),
                task: tokio::spawn(look_after(Arc::clone(upstream))).abort_handle(),
            });
            self.0.insert(key, tender);
        }
        before.into_values().for_each(|tender| tender.task.abort());
    }
}

async fn look_after(upstream: Arc<Upstream>) {
    let mut changes = upstream.changes();
    let mut tries = JoinSet::new();
    let mut checks = Checks::default();
    let checked = upstream.meant().health.is_some();
    let step = upstream.slow_start() / STEPS;
    loop {
        for host in upstream.take_troubled() {
            tries.spawn(find_out(Arc::clone(&upstream), Tended(host)));
        }
        checks.follow(&upstream);
        let warming =
            !step.is_zero() && upstream.hosts().iter().any(|it| upstream.share(it) < STEPS);
        tokio::select! {
            () = upstream.trouble.notified() => {}
            Some(_) = tries.join_next() => {}
            () = sleep(step), if warming => upstream.shares_have_changed(),
            Ok(()) = changes.changed(), if checked => {}
        }
    }
}

/// Those who ask the hosts of an upstream, by their hosts.
#[derive(Default)]
struct Checks {
    tasks: JoinSet<()>,
    of: HashMap<usize, (Arc<Host>, AbortHandle)>,
}

impl Checks {
    /// Has the hosts checked that there are now, and no others.
    fn follow(&mut self, upstream: &Arc<Upstream>) {
        let Some(rules) = &upstream.meant().health else { return };
        let mut before = std::mem::take(&mut self.of);
        for endpoint in upstream.endpoints() {
            for host in endpoint.hosts().iter() {
                let key = Arc::as_ptr(host).addr();
                let checked = before.remove(&key).unwrap_or_else(|| {
                    let (upstream, endpoint) = (Arc::clone(upstream), Arc::clone(endpoint));
                    let check = check(upstream, endpoint, Arc::clone(host), rules.clone());
                    (Arc::clone(host), self.tasks.spawn(check))
                });
                self.of.insert(key, checked);
            }
        }
        before.into_values().for_each(|(_, task)| task.abort());
        while self.tasks.try_join_next().is_some() {}
    }
}

/// Checks a host again and again, at a time of its own.
async fn check(
    upstream: Arc<Upstream>,
    endpoint: Arc<Endpoint>,
    host: Arc<Host>,
    rules: config::Health,
) {
    sleep(rules.interval.min(FIRST).mul_f64(fastrand::f64())).await;
    loop {
        let found = timeout(rules.timeout, ask(&rules.ask, &endpoint, &host)).await;
        let found = found.unwrap_or_else(|_elapsed| {
            Err(format!("no answer within {}", humantime::format_duration(rules.timeout)))
        });
        upstream.checked(&host, &rules, found);
        sleep(rules.interval.mul_f64(0.9 + 0.2 * fastrand::f64())).await;
    }
}

async fn ask(ask: &config::Ask, endpoint: &Endpoint, host: &Host) -> Result<(), String> {
    let connected = connect::to(host, &As::Ambassador(None)).await;
    let socket = connected.map_err(|error| format!("connect: {error}"))?;
    probe::answers(ask, endpoint.label(), socket).await.map_err(|error| format!("{error:#}"))
}

/// A host that somebody finds out about.
struct Tended(Arc<Host>);

impl Drop for Tended {
    fn drop(&mut self) {
        self.0.end_to_tend();
    }
}

/// Tries a host until it is clear that it works, or that it must stay in spite of all.
async fn find_out(upstream: Arc<Upstream>, tended: Tended) {
    let host = &tended.0;
    let Some(eject) = &upstream.meant().eject else { return };
    for _ in 0..eject.consecutive_failures.get() {
        if host.is_ejected() {
            break;
        }
        sleep(DOUBT).await;
        match attempt(&upstream, host).await {
            Ok(()) => return upstream.reached(host),
            Err(why) => upstream.unreached(host, &why),
        }
    }
    while let Some(rest) = host.ejected_for() {
        let all = upstream.hosts();
        if !all.iter().any(|it| Arc::ptr_eq(it, host)) {
            // Its name has left it: somebody else's by now, perhaps.
            return;
        }
        // However many there are, it takes few connections to find out.
        let soon = URGENT * u32::try_from(all.len().div_ceil(10)).unwrap_or(u32::MAX);
        sleep(rest.min(soon)).await;
        let over = host.ejected_for() == Some(Duration::ZERO);
        if !over && all.iter().any(|it| it.is_good() && !it.is_blamed()) {
            continue;
        }
        let works = attempt(&upstream, host).await.is_ok();
        if works {
            upstream.readmit(host);
        } else if host.ejected_for() == Some(Duration::ZERO) {
            upstream.keep_ejected(host);
        }
    }
}

/// Connects, and says why that fails. Whether it answers well is for checks to say.
async fn attempt(upstream: &Upstream, host: &Host) -> Result<(), String> {
    match timeout(upstream.connect.timeout, connect::to(host, &As::Ambassador(None))).await {
        Ok(reached) => reached.map(drop).map_err(|error| error.to_string()),
        Err(_elapsed) => Err("no answer".to_owned()),
    }
}

//! Finds out how hosts are: one task for each upstream of which one could be taken out.
//!
//! Where checks are configured, each host is asked again and again, whatever becomes of connections.
//! A host that connections speak against is tried by ourselves, so that it is soon clear whether it fails;
//! one that has been taken out is tried before connections go there again.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use crate::proxy::connect::{self, As};
use crate::upstream::health::STEPS;
use crate::upstream::host::Host;
use crate::upstream::{Endpoint, Upstream};
use crate::{config, probe};

/// Between two tries of a host that connections speak against.
const DOUBT: Duration = Duration::from_millis(200);
/// Between two looks at addresses that a name has left, where their connections are to end with them.
const LOOKS: Duration = Duration::from_secs(5);
/// Within so long the first check begins.
const FIRST: Duration = Duration::from_secs(1);
/// A check that speaks against a host is repeated this part of the interval after it began; at once if it took longer.
const IN_DOUBT: u32 = 5;
/// Checks that are due within this part of the interval begin together: to wake up costs more than to ask.
const TOGETHER: u32 = 20;
/// Between two tries of a host while no other is sure to work, and of any ten of them.
const URGENT: Duration = Duration::from_millis(500);

/// Those who look after the upstreams in service.
#[derive(Debug, Default)]
pub struct Tending(HashMap<usize, Tender>);

#[derive(Debug)]
struct Tender {
    /// As long as it is here, nobody else has its address, which is the key.
    of: Arc<Upstream>,
    task: AbortHandle,
}

impl Tending {
    /// From now on these upstreams are looked after, and no others.
    pub fn look_after<'u>(&mut self, upstreams: impl Iterator<Item = &'u Arc<Upstream>>) {
        let wanted: HashMap<_, _> = upstreams.map(|it| (Arc::as_ptr(it).addr(), it)).collect();
        // First, because those in their place see to what is out when they take over.
        for (_, gone) in self.0.extract_if(|key, _| !wanted.contains_key(key)) {
            gone.of.retire();
            gone.task.abort();
        }
        let may_lose_one = |upstream: &Upstream| {
            let meant = upstream.meant();
            let alone = upstream.endpoints().len() == 1 && upstream.endpoints()[0].name().is_none();
            meant.health.is_some() || meant.eject.is_some() && !alone
        };
        for (key, upstream) in wanted {
            if self.0.contains_key(&key) {
                continue;
            }
            upstream.take_over();
            if !may_lose_one(upstream) {
                continue;
            }
            let task = tokio::spawn(look_after(Arc::clone(upstream))).abort_handle();
            self.0.insert(key, Tender { of: Arc::clone(upstream), task });
        }
    }
}

async fn look_after(upstream: Arc<Upstream>) {
    let mut changes = upstream.changes();
    let mut tries = JoinSet::new();
    let mut checks = Checks::default();
    let step = upstream.slow_start() / STEPS;
    let mut tended = HashSet::new();
    let closes = upstream.meant().closes_unhealthy();
    let mut looks = interval(LOOKS);
    let mut troubled = Vec::new();
    let mut steps = interval(if step.is_zero() { LOOKS } else { step });
    steps.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut warming = false;
    loop {
        upstream.keep_one();
        troubled.extend(upstream.take_troubled());
        // Also those that a name has come back to as they were.
        troubled.extend(upstream.hosts().into_iter().filter(|host| host.is_ejected()));
        for host in troubled.drain(..) {
            let key = Arc::as_ptr(&host).addr();
            if tended.insert(key) {
                let upstream = Arc::clone(&upstream);
                tries.spawn(async move {
                    find_out(&upstream, &host).await;
                    key
                });
            }
        }
        checks.follow(&upstream);
        let warm = step.is_zero() || upstream.hosts().iter().all(|it| upstream.share(it) == STEPS);
        if warming && warm {
            // The last step may have been noticed on another occasion.
            upstream.shares_have_changed();
        }
        warming = !warm;
        tokio::select! {
            () = upstream.trouble.notified() => {}
            Some(Ok(key)) = tries.join_next() => {
                tended.remove(&key);
            }
            _ = steps.tick(), if warming => upstream.shares_have_changed(),
            Ok(()) = changes.changed() => {}
            _ = looks.tick(), if closes => troubled = upstream.left(),
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
    /// Has the hosts checked that there are now, and those that are left but may have to be given up.
    fn follow(&mut self, upstream: &Arc<Upstream>) {
        let Some(rules) = &upstream.meant().health else { return };
        let mut before = std::mem::take(&mut self.of);
        for endpoint in upstream.endpoints() {
            let left =
                if upstream.meant().closes_unhealthy() { endpoint.left() } else { Vec::new() };
            for host in endpoint.hosts().iter().chain(&left) {
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
        let begun = Instant::now();
        let found = timeout(rules.timeout, ask(&rules.ask, &endpoint, &host)).await;
        let found = found.unwrap_or_else(|_elapsed| {
            Err(format!("no answer within {}", humantime::format_duration(rules.timeout)))
        });
        upstream.checked(&host, &rules, found);
        let doubted = host.health().is_doubted();
        let rest = if doubted { rules.interval / IN_DOUBT } else { rules.interval };
        let due = begun + rest.mul_f64(0.9 + 0.2 * fastrand::f64());
        sleep_until(with_others(due, rest / TOGETHER)).await;
    }
}

/// When what is due then begins, with all that has been due for no longer than a tick.
fn with_others(due: Instant, tick: Duration) -> Instant {
    static CLOCK: LazyLock<Instant> = LazyLock::new(Instant::now);
    let ticks = due.duration_since(*CLOCK).div_duration_f64(tick);
    *CLOCK + tick.mul_f64(ticks.ceil())
}

async fn ask(ask: &config::Ask, endpoint: &Endpoint, host: &Host) -> Result<(), String> {
    let connected = connect::to(host, &As::Check).await;
    let socket = connected.map_err(|error| format!("connect: {error}"))?;
    // A service is no name of a host.
    let address = endpoint.label().starts_with("srv:").then(|| host.at.to_string());
    let label = address.as_deref().unwrap_or(endpoint.label());
    probe::answers(ask, label, socket).await.map_err(|error| format!("{error:#}"))
}

/// Tries a host until it is clear that it works, or that it must stay in spite of all.
async fn find_out(upstream: &Upstream, host: &Arc<Host>) {
    let Some(eject) = &upstream.meant().eject else { return };
    for _ in 0..eject.consecutive_failures.get() {
        if host.is_ejected() {
            break;
        }
        sleep(DOUBT).await;
        match attempt(upstream, host).await {
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
        let works = attempt(upstream, host).await.is_ok();
        if works {
            upstream.readmit(host, "it can be reached");
        } else if host.ejected_for() == Some(Duration::ZERO) {
            upstream.keep_ejected(host);
        }
    }
}

/// Connects, and says why that fails. Whether it answers well is for checks to say.
async fn attempt(upstream: &Upstream, host: &Host) -> Result<(), String> {
    match timeout(upstream.connect.timeout, connect::to(host, &As::Check)).await {
        Ok(reached) => reached.map(drop).map_err(|error| error.to_string()),
        Err(_elapsed) => Err("no answer".to_owned()),
    }
}

//! One question to DNS: the addresses of a host, or where the SRV records of a service lead.
//!
//! A and AAAA are asked apart, so a server that mishandles one of the two does not hold up the other. Of a
//! service's targets only those of the lowest priority that have addresses count; each of those counts alike.
//! A target that is not answered for stays where it was.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::ServerOrderingStrategy;
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::proto::rr::rdata::SRV;
use hickory_resolver::proto::rr::{IntoName, Name, RData, Record, RecordType};
use tokio::task::JoinSet;
use tokio::time::error::Elapsed;
use tokio::time::{timeout, timeout_at};

/// The whole of a lookup: all servers, tries and search domains. The targets of a service have as long again.
const LOOKUP: Duration = Duration::from_secs(20);
/// How long the slower of A and AAAA may lag behind the faster before it is left out of this answer.
const SECOND_FAMILY: Duration = Duration::from_secs(2);
/// The same while somebody may be waiting.
const SECOND_FAMILY_IN_HASTE: Duration = Duration::from_millis(50);
/// How long one target of a service may take, and while somebody may be waiting for the others.
const TARGET: Duration = Duration::from_secs(8);
const TARGET_IN_HASTE: Duration = Duration::from_secs(2);
/// So many targets of a service are asked for at a time.
const TARGETS_AT_A_TIME: usize = 8;
/// Of a service; each may take a question of its own.
const MOST_TARGETS: usize = 64;

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Question {
    Host(Arc<str>),
    Service(Arc<str>),
}

/// What is made of answers that are late, or fail.
#[derive(Debug, Clone, Copy)]
pub(super) struct Manner {
    /// What was known may stay.
    pub(super) stale: bool,
    /// Somebody may be waiting: what is late is left out, and to be asked for soon.
    pub(super) haste: bool,
}

/// Where the targets of a service are, with port 0.
pub(super) type Targets = HashMap<Name, Vec<SocketAddr>>;

/// What was found, if that is not nothing.
pub(super) struct Heard {
    /// Those of a host have port 0.
    pub(super) addresses: Vec<SocketAddr>,
    /// How long they hold.
    pub(super) ttl: Duration,
    /// The family that was not answered for.
    pub(super) without: Option<RecordType>,
}

impl Question {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Host(name) | Self::Service(name) => name,
        }
    }

    /// Asks it. That the server fails for one family only is an answer, unless what was known may be stale. Of
    /// a service, `targets` remembers where those are.
    pub(super) async fn ask(&self, manner: Manner, targets: &mut Targets) -> Result<Heard> {
        // Made anew each time, so that a changed resolv.conf or hosts file is seen.
        let mut builder = TokioResolver::builder_tokio().context("read /etc/resolv.conf")?;
        let options = builder.options_mut();
        options.cache_size = 0;
        // As resolv.conf says: the first server first.
        options.server_ordering_strategy = ServerOrderingStrategy::UserProvidedOrder;
        let resolver = builder.build().context("set up the resolver")?;
        match self {
            Self::Host(host) => {
                timeout(LOOKUP, addresses(&resolver, &**host, manner)).await.map_err(silence)?
            }
            Self::Service(name) => {
                let services = resolver.lookup(&**name, RecordType::SRV);
                let services = timeout(LOOKUP, services).await.map_err(silence)??;
                follow(&resolver, &services, manner, targets).await
            }
        }
    }
}

impl Heard {
    /// These addresses, and what was known of the family that nothing was heard of.
    pub(super) fn with(mut self, known: &[SocketAddr]) -> Vec<SocketAddr> {
        let stay = known.iter().filter(|address| Some(family(address)) == self.without);
        self.addresses.extend(stay);
        self.addresses
    }
}

fn family(address: &SocketAddr) -> RecordType {
    if address.is_ipv4() { RecordType::A } else { RecordType::AAAA }
}

fn silence(_elapsed: Elapsed) -> Error {
    anyhow!("DNS did not answer in time")
}

/// Whether it says that there is nothing, which is an answer.
fn says_none(error: &Error) -> bool {
    error.downcast_ref::<NetError>().is_some_and(NetError::is_no_records_found)
}

/// The addresses of a host, with port 0.
async fn addresses(
    resolver: &TokioResolver,
    host: impl IntoName + Clone,
    manner: Manner,
) -> Result<Heard> {
    let v4 = pin!(resolver.lookup(host.clone(), RecordType::A));
    let v6 = pin!(resolver.lookup(host, RecordType::AAAA));
    let lag = if manner.haste { SECOND_FAMILY_IN_HASTE } else { SECOND_FAMILY };
    let answers = either_or_both(v4, v6, lag).await;
    let mut addresses = Vec::new();
    let mut until: Option<Instant> = None;
    let (mut failure, mut without) = (None, None);
    for (family, answer) in [RecordType::A, RecordType::AAAA].into_iter().zip(answers) {
        match answer {
            None => {
                without = Some(family);
                if manner.haste {
                    until = Some(Instant::now());
                }
            }
            Some(Ok(answer)) => {
                addresses.extend(answer.answers().iter().filter_map(address));
                let end = answer.valid_until();
                until = Some(until.map_or(end, |soonest| soonest.min(end)));
            }
            Some(Err(error)) => {
                let says_none = error.is_no_records_found();
                if manner.stale && !says_none {
                    without = Some(family);
                }
                // That there is nothing in one family says little when the other fails.
                if failure.is_none() || !says_none {
                    failure = Some(error);
                }
            }
        }
    }
    match (until, failure) {
        (Some(until), _) if !addresses.is_empty() => {
            let ttl = until.saturating_duration_since(Instant::now());
            Ok(Heard { addresses, ttl, without })
        }
        (_, Some(error)) => Err(anyhow!(error)),
        (_, None) => Err(anyhow!("the answer has no address")),
    }
}

fn address(record: &Record) -> Option<SocketAddr> {
    let ip = match record.data {
        RData::A(address) => IpAddr::from(address.0),
        RData::AAAA(address) => IpAddr::from(address.0),
        _ => return None,
    };
    Some(SocketAddr::new(ip, 0))
}

/// Where a service is: at its targets of the lowest priority that have addresses.
async fn follow(
    resolver: &TokioResolver,
    answer: &Lookup,
    manner: Manner,
    known: &mut Targets,
) -> Result<Heard> {
    let mut ttl = answer.valid_until().saturating_duration_since(Instant::now());
    let mut services: Vec<&SRV> = Vec::new();
    services.extend(answer.answers().iter().filter_map(|record| match &record.data {
        // The root as target says that there is no such service here (RFC 2782).
        RData::SRV(service) if !service.target.is_root() => Some(service),
        _ => None,
    }));
    services.sort_by_key(|service| (service.priority, service.target.clone(), service.port));
    services.truncate(MOST_TARGETS);
    known.retain(|target, _| services.iter().any(|service| service.target == *target));
    let until = tokio::time::Instant::now() + LOOKUP;
    let mut failure = anyhow!("the answer has no target");
    for equals in services.chunk_by(|one, other| one.priority == other.priority) {
        let mut unknown = Vec::new();
        for service in equals.chunk_by(|one, other| one.target == other.target) {
            let target = &service[0].target;
            // Servers tell these beside the answer, if they know them.
            let mut beside = Vec::new();
            for record in answer.additionals().iter().filter(|record| record.name == *target) {
                beside.extend(address(record).inspect(|_| {
                    ttl = ttl.min(Duration::from_secs(record.ttl.into()));
                }));
            }
            if beside.is_empty() {
                unknown.push(target.clone());
            } else {
                known.insert(target.clone(), beside);
            }
        }
        let mut unknown = unknown.into_iter();
        let mut asked = JoinSet::new();
        loop {
            for target in unknown.by_ref().take(TARGETS_AT_A_TIME - asked.len()) {
                asked.spawn(look_up(resolver.clone(), target, manner, until));
            }
            let Some(heard) = asked.join_next().await else { break };
            let (target, heard) = heard.context("look up a target")?;
            match heard {
                Ok(heard) => {
                    ttl = ttl.min(heard.ttl);
                    let before = known.remove(&target).unwrap_or_default();
                    known.insert(target, heard.with(&before));
                }
                Err(error) => {
                    if says_none(&error) || !manner.stale {
                        known.remove(&target);
                    }
                    if manner.haste && !says_none(&error) {
                        ttl = Duration::ZERO;
                    }
                    failure = error.context(format!("look up the target {target}"));
                }
            }
        }
        let addresses = equals.iter().flat_map(|SRV { target, port, .. }| {
            let at = known.get(target).into_iter().flatten();
            at.map(|address| SocketAddr::new(address.ip(), *port))
        });
        let addresses: Vec<_> = addresses.collect();
        if !addresses.is_empty() {
            return Ok(Heard { addresses, ttl, without: None });
        }
    }
    bail!(failure)
}

/// Where one target of a service is.
async fn look_up(
    resolver: TokioResolver,
    target: Name,
    manner: Manner,
    until: tokio::time::Instant,
) -> (Name, Result<Heard>) {
    let limit = if manner.haste { TARGET_IN_HASTE } else { TARGET };
    let until = until.min(tokio::time::Instant::now() + limit);
    let heard = timeout_at(until, addresses(&resolver, target.clone(), manner)).await;
    (target, heard.map_err(silence).flatten())
}

/// Both answers; or the first to come alone when it is good and the second is late.
async fn either_or_both<F: Future<Output = Result<Lookup, NetError>>>(
    mut v4: Pin<&mut F>,
    mut v6: Pin<&mut F>,
    lag: Duration,
) -> [Option<F::Output>; 2] {
    let (first, second, is_v4) = tokio::select! {
        first = &mut v4 => (first, v6, true),
        first = &mut v6 => (first, v4, false),
    };
    let good = first.as_ref().is_ok_and(|answer| !answer.answers().is_empty());
    let second = if good { timeout(lag, second).await.ok() } else { Some(second.await) };
    if is_v4 { [Some(first), second] } else { [second, Some(first)] }
}

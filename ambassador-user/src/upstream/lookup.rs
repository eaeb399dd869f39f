//! One question to DNS: the addresses of a host, or where the SRV records of a service lead.
//!
//! A and AAAA are asked apart, so a server that mishandles one of the two does not hold up the other. Of a
//! service's targets only those of the lowest priority that have addresses count; each of those counts alike.

use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::ServerOrderingStrategy;
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::proto::rr::rdata::SRV;
use hickory_resolver::proto::rr::{IntoName, RData, Record, RecordType};

/// The whole of a lookup: all servers, tries, search domains and targets.
const LOOKUP: Duration = Duration::from_secs(20);
/// How long the slower of A and AAAA may lag behind the faster before it is left out of this answer.
const SECOND_FAMILY: Duration = Duration::from_millis(50);
/// Of a service; each may take a question of its own.
const MOST_TARGETS: usize = 64;

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Question {
    Host(Arc<str>),
    Service(Arc<str>),
}

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

    /// Asks it. That the server fails for one family only is an answer, unless what was known may be `stale`.
    pub(super) async fn ask(&self, stale: bool) -> Result<Heard> {
        // Made anew each time, so that a changed resolv.conf or hosts file is seen.
        let mut builder = TokioResolver::builder_tokio().context("read /etc/resolv.conf")?;
        let options = builder.options_mut();
        options.cache_size = 0;
        // As resolv.conf says: the first server first.
        options.server_ordering_strategy = ServerOrderingStrategy::UserProvidedOrder;
        let resolver = builder.build().context("set up the resolver")?;
        let asked = async {
            match self {
                Self::Host(host) => addresses(&resolver, &**host, 0, stale).await,
                Self::Service(name) => targets(&resolver, name).await,
            }
        };
        tokio::time::timeout(LOOKUP, asked)
            .await
            .map_err(|_elapsed| anyhow!("DNS did not answer within {} s", LOOKUP.as_secs()))?
    }
}

pub(super) fn family(address: &SocketAddr) -> RecordType {
    if address.is_ipv4() { RecordType::A } else { RecordType::AAAA }
}

/// The addresses of a host, with this port.
async fn addresses(
    resolver: &TokioResolver,
    host: impl IntoName + Clone,
    port: u16,
    stale: bool,
) -> Result<Heard> {
    let v4 = pin!(resolver.lookup(host.clone(), RecordType::A));
    let v6 = pin!(resolver.lookup(host, RecordType::AAAA));
    let answers = either_or_both(v4, v6).await;
    let mut addresses = Vec::new();
    let mut until: Option<Instant> = None;
    let (mut failure, mut without) = (None, None);
    for (family, answer) in [RecordType::A, RecordType::AAAA].into_iter().zip(answers) {
        match answer {
            None => without = Some(family),
            Some(Ok(answer)) => {
                addresses.extend(answer.answers().iter().filter_map(|it| address(it, port)));
                let end = answer.valid_until();
                until = Some(until.map_or(end, |soonest| soonest.min(end)));
            }
            Some(Err(error)) => {
                if stale && !error.is_no_records_found() {
                    without = Some(family);
                }
                failure = Some(error);
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

fn address(record: &Record, port: u16) -> Option<SocketAddr> {
    let ip = match record.data {
        RData::A(address) => IpAddr::from(address.0),
        RData::AAAA(address) => IpAddr::from(address.0),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// Where a service is: at its targets of the lowest priority that have addresses.
async fn targets(resolver: &TokioResolver, service: &str) -> Result<Heard> {
    let answer = resolver.lookup(service, RecordType::SRV).await?;
    let mut ttl = answer.valid_until().saturating_duration_since(Instant::now());
    let mut services: Vec<&SRV> = Vec::new();
    services.extend(answer.answers().iter().filter_map(|record| match &record.data {
        // The root as target says that there is no such service here (RFC 2782).
        RData::SRV(service) if !service.target.is_root() => Some(service),
        _ => None,
    }));
    services.sort_by_key(|service| (service.priority, service.target.clone(), service.port));
    services.truncate(MOST_TARGETS);
    let mut failure = anyhow!("the answer has no target");
    for equals in services.chunk_by(|one, other| one.priority == other.priority) {
        let mut found = Vec::new();
        for SRV { target, port, .. } in equals {
            // Servers tell these beside the answer, if they know them.
            let beside = answer.additionals().iter().filter(|record| record.name == *target);
            let known = found.len();
            found.extend(beside.filter_map(|record| {
                let address = address(record, *port)?;
                ttl = ttl.min(Duration::from_secs(record.ttl.into()));
                Some(address)
            }));
            if found.len() > known {
                continue;
            }
            match addresses(resolver, target.clone(), *port, false).await {
                Ok(heard) => {
                    ttl = ttl.min(heard.ttl);
                    found.extend(heard.addresses);
                }
                Err(error) => failure = error.context(format!("look up the target {target}")),
            }
        }
        if !found.is_empty() {
            return Ok(Heard { addresses: found, ttl, without: None });
        }
    }
    bail!(failure)
}

/// Both answers; or the first to come alone when it is good and the second is late.
async fn either_or_both<F: Future<Output = Result<Lookup, NetError>>>(
    mut v4: Pin<&mut F>,
    mut v6: Pin<&mut F>,
) -> [Option<F::Output>; 2] {
    let (first, second, is_v4) = tokio::select! {
        first = &mut v4 => (first, v6, true),
        first = &mut v6 => (first, v4, false),
    };
    let good = first.as_ref().is_ok_and(|answer| !answer.answers().is_empty());
    let second = if good {
        tokio::time::timeout(SECOND_FAMILY, second).await.ok()
    } else {
        Some(second.await)
    };
    if is_v4 { [Some(first), second] } else { [second, Some(first)] }
}

//! Names: where they point now, kept true in the background.
//!
//! A connection never waits for DNS while an address is known. Each distinct name has one task that
//! asks again when its answer expires (within the route's bounds) and, while DNS fails, keeps the last
//! good answer if it may. A and AAAA are asked apart, so a server that mishandles one of the two does
//! not hold up the other; of the one that is not answered for, what was known stays.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::ServerOrderingStrategy;
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::proto::rr::{RData, RecordType};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::{info, warn};

use super::Upstream;
use crate::config;

/// Answers with more addresses than this are cut: nobody tries that many.
const MOST_ADDRESSES: usize = 256;
/// The whole of a lookup: all servers, tries and search domains.
const LOOKUP: Duration = Duration::from_secs(20);
/// How long the slower of A and AAAA may lag behind the faster before it is left out of this answer.
const SECOND_FAMILY: Duration = Duration::from_millis(50);

/// The distinct names of a configuration, and who asks for each.
#[derive(Debug, Default)]
pub struct Names {
    /// By host, one a policy.
    all: HashMap<Arc<str>, Vec<Asked>>,
    /// Told when any of them points elsewhere, or a host becomes good or bad.
    changes: Arc<watch::Sender<()>>,
}

/// A name, and the task that keeps it true, once there is one.
#[derive(Debug)]
struct Asked {
    name: Arc<Name>,
    task: Option<AbortHandle>,
}

/// One name and what is known of it.
#[derive(Debug)]
pub struct Name {
    host: Arc<str>,
    policy: config::Dns,
    answer: watch::Sender<Answer>,
    changes: Arc<watch::Sender<()>>,
}

#[derive(Debug, Clone)]
enum Answer {
    /// Asked, not yet answered.
    Awaited,
    Known(Arc<[IpAddr]>),
    Failed(Arc<str>),
}

impl Names {
    /// The name `host` under `policy`, shared by all endpoints that have both. Of one that is known under
    /// another policy the addresses are known.
    pub fn get(&mut self, host: &Arc<str>, policy: config::Dns) -> Arc<Name> {
        let all = self.all.entry(Arc::clone(host)).or_default();
        if let Some(known) = all.iter().find(|asked| asked.name.policy == policy) {
            return Arc::clone(&known.name);
        }
        let known = all.iter().map(|asked| asked.name.answer.borrow().clone());
        let mut known = known.filter(|answer| matches!(answer, Answer::Known(_)));
        let answer = watch::Sender::new(known.next().unwrap_or(Answer::Awaited));
        drop(known);
        let changes = Arc::clone(&self.changes);
        let name = Arc::new(Name { host: Arc::clone(host), policy, answer, changes });
        all.push(Asked { name: Arc::clone(&name), task: None });
        name
    }

    /// Tells when that has happened.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Who is told of that, and tells of other changes.
    pub(super) fn changes_of_all(&self) -> Arc<watch::Sender<()>> {
        Arc::clone(&self.changes)
    }

    /// Asks from now on for the names that these upstreams have, and for no others.
    pub fn ask_for<'u>(&mut self, upstreams: impl Iterator<Item = &'u Upstream>) {
        let endpoints = upstreams.flat_map(Upstream::endpoints);
        let used: HashSet<_> =
            endpoints.filter_map(|endpoint| endpoint.name()).map(Arc::as_ptr).collect();
        self.all.retain(|_, all| {
            all.retain_mut(|asked| {
                let keep = used.contains(&Arc::as_ptr(&asked.name));
                if !keep {
                    asked.task.iter().for_each(AbortHandle::abort);
                } else if asked.task.is_none() {
                    let name = Arc::clone(&asked.name);
                    let task = tokio::spawn(async move { name.keep_true().await });
                    asked.task = Some(task.abort_handle());
                }
                keep
            });
            !all.is_empty()
        });
    }
}

impl Name {
    /// The addresses, at least one. Waits only while nothing has ever been answered; callers bound it.
    pub async fn addresses(&self) -> Result<Arc<[IpAddr]>> {
        let mut answer = self.answer.subscribe();
        let settled = answer
            .wait_for(|answer| !matches!(answer, Answer::Awaited))
            .await
            .context("wait for the first answer of DNS")?;
        match &*settled {
            Answer::Known(addresses) => Ok(Arc::clone(addresses)),
            Answer::Failed(why) => Err(anyhow!("{} does not resolve: {why}", self.host)),
            Answer::Awaited => bail!("{} is not resolved yet", self.host),
        }
    }

    /// The addresses known now, perhaps none.
    pub fn known(&self) -> Arc<[IpAddr]> {
        match &*self.answer.borrow() {
            Answer::Known(addresses) => Arc::clone(addresses),
            Answer::Awaited | Answer::Failed(_) => Arc::default(),
        }
    }

    async fn keep_true(&self) {
        let mut pause = self.policy.min_ttl;
        loop {
            match lookup(&self.host, self.policy.stale).await {
                Ok(Heard { addresses, ttl, without }) => {
                    self.know(self.with_known(addresses, without));
                    pause = self.policy.min_ttl;
                    tokio::time::sleep(ttl.clamp(self.policy.min_ttl, self.policy.max_ttl)).await;
                }
                Err(error) => {
                    self.fail(&error);
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(self.policy.max_ttl);
                }
            }
        }
    }

    /// These addresses, and what is known of the family that nothing was heard of.
    fn with_known(&self, mut addresses: Vec<IpAddr>, family: Option<RecordType>) -> Arc<[IpAddr]> {
        let known = self.known();
        addresses.extend(known.iter().filter(|address| Some(family_of(address)) == family));
        addresses.sort_unstable();
        addresses.dedup();
        addresses.truncate(MOST_ADDRESSES);
        addresses.into()
    }

    fn know(&self, addresses: Arc<[IpAddr]>) {
        let changed = self.answer.send_if_modified(|answer| {
            // The order is the server's to shuffle; only a different set is news.
            let same = matches!(answer, Answer::Known(known) if *known == addresses);
            if !same {
                info!(name = %self.host, ?addresses, "resolved");
                *answer = Answer::Known(addresses);
            }
            !same
        });
        if changed {
            self.changes.send_replace(());
        }
    }

    fn fail(&self, error: &anyhow::Error) {
        let why: Arc<str> = format!("{error:#}").into();
        let changed = self.answer.send_if_modified(|answer| {
            match answer {
                Answer::Failed(known) if *known == why => return false,
                Answer::Known(addresses) if self.policy.stale => {
                    warn!(name = %self.host, ?addresses, "cannot resolve: {why}; the last good addresses stay in use");
                    return false;
                }
                _ => warn!(name = %self.host, "cannot resolve: {why}; asking again"),
            }
            *answer = Answer::Failed(why);
            true
        });
        if changed {
            self.changes.send_replace(());
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.answer.borrow() {
            Answer::Awaited => f.write_str("not resolved yet"),
            Answer::Failed(why) => write!(f, "does not resolve: {why}"),
            Answer::Known(addresses) => {
                let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
                f.write_str(&addresses.join(" "))
            }
        }
    }
}

/// What a lookup has found, if that is not nothing.
struct Heard {
    addresses: Vec<IpAddr>,
    ttl: Duration,
    /// The family that was not answered for.
    without: Option<RecordType>,
}

fn family_of(address: &IpAddr) -> RecordType {
    if address.is_ipv4() { RecordType::A } else { RecordType::AAAA }
}

/// The addresses of `host`. That the server fails for one family only is an answer, unless what was known may
/// be `stale`.
async fn lookup(host: &str, stale: bool) -> Result<Heard> {
    // Made anew each time, so that a changed resolv.conf or hosts file is seen.
    let mut builder = TokioResolver::builder_tokio().context("read /etc/resolv.conf")?;
    let options = builder.options_mut();
    options.cache_size = 0;
    // As resolv.conf says: the first server first.
    options.server_ordering_strategy = ServerOrderingStrategy::UserProvidedOrder;
    let resolver = builder.build().context("set up the resolver")?;
    let v4 = pin!(resolver.lookup(host, RecordType::A));
    let v6 = pin!(resolver.lookup(host, RecordType::AAAA));
    let answers = tokio::time::timeout(LOOKUP, either_or_both(v4, v6))
        .await
        .map_err(|_elapsed| anyhow!("DNS did not answer within {} s", LOOKUP.as_secs()))?;

    let mut addresses = Vec::new();
    let mut until: Option<Instant> = None;
    let (mut failure, mut without) = (None, None);
    for (family, answer) in [RecordType::A, RecordType::AAAA].into_iter().zip(answers) {
        match answer {
            None => without = Some(family),
            Some(Ok(answer)) => {
                addresses.extend(answer.answers().iter().filter_map(|record| match record.data {
                    RData::A(address) => Some(IpAddr::from(address.0)),
                    RData::AAAA(address) => Some(IpAddr::from(address.0)),
                    _ => None,
                }));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn upstream(text: &str, names: &mut Names) -> Arc<Upstream> {
        let text = format!(
            "{{version: 1, routes: [{{listen: 1, upstream: u}}], \
             upstreams: {{u: {{endpoints: ['db.invalid:1'], dns: {text}}}}}}}"
        );
        let resolved = config::Resolved::of_text("c.yaml".as_ref(), text).unwrap();
        Upstream::new(&resolved.config.routes[0].upstream, None, names)
    }

    #[tokio::test]
    async fn a_name_that_stays_is_asked_for_once_and_one_that_goes_no_more() {
        let mut names = Names::default();
        let one = upstream("{max_ttl: 5s}", &mut names);
        names.ask_for([&*one].into_iter());
        let task = names.all["db.invalid"][0].task.clone().unwrap();
        let same = upstream("{max_ttl: 5s}", &mut names);
        names.ask_for([&*same].into_iter());
        assert_eq!(names.all["db.invalid"][0].task.as_ref().map(AbortHandle::id), Some(task.id()));

        let known: Arc<[IpAddr]> = Arc::new(["10.0.0.1".parse().unwrap()]);
        one.endpoints()[0].name().unwrap().know(Arc::clone(&known));
        let other = upstream("{max_ttl: 9s}", &mut names);
        assert_eq!(other.endpoints()[0].name().unwrap().known(), known);
        names.ask_for([&*other].into_iter());
        assert_eq!(names.all["db.invalid"].len(), 1);
        while !task.is_finished() {
            tokio::task::yield_now().await;
        }
        names.ask_for(std::iter::empty());
        assert!(names.all.is_empty());
    }
}

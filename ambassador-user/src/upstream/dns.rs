//! Names: where they point now, kept true in the background.
//!
//! A connection never waits for DNS while an address is known. Each distinct name has one task that
//! asks again when its answer expires (within the route's bounds) and, while DNS fails, keeps the last
//! good answer if it may. Of a family of addresses that is not answered for, what was known stays. So many
//! ask at a time, at times of their own.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{info, warn};

use super::Upstream;
use super::lookup::{Heard, Manner, Question, Targets};
use crate::config;

/// Answers with more addresses than this are cut: nobody tries that many.
const MOST_ADDRESSES: usize = 256;
/// So many lookups begin at a time, of all names: hundreds of names are no flood.
static TURNS: Semaphore = Semaphore::const_new(16);
/// A lookup that takes longer lets the next one begin: names that nobody answers for hold up no other for long.
const TURN: Duration = Duration::from_millis(500);
/// So long after it was first asked for, a name without an answer holds up nobody who could go elsewhere.
const PATIENCE: Duration = Duration::from_millis(500);

/// The distinct names of a configuration, and who asks for each.
#[derive(Debug, Default)]
pub struct Names {
    /// One a policy.
    all: HashMap<Question, Vec<Asked>>,
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
    question: Question,
    policy: config::Dns,
    answer: watch::Sender<Answer>,
    /// Since when it is asked for.
    asked: OnceLock<Instant>,
    changes: Arc<watch::Sender<()>>,
}

#[derive(Debug, Clone)]
enum Answer {
    /// Asked, not yet answered.
    Awaited,
    Known(Arc<[SocketAddr]>),
    Failed(Arc<str>),
}

impl Names {
    /// The name that this asks for under `policy`, shared by all endpoints that have both. Of one that is
    /// known under another policy the addresses are known.
    pub fn get(&mut self, question: Question, policy: config::Dns) -> Arc<Name> {
        let all = self.all.entry(question.clone()).or_default();
        if let Some(known) = all.iter().find(|asked| asked.name.policy == policy) {
            return Arc::clone(&known.name);
        }
        let known = all.iter().map(|asked| asked.name.answer.borrow().clone());
        let mut known = known.filter(|answer| matches!(answer, Answer::Known(_)));
        let answer = watch::Sender::new(known.next().unwrap_or(Answer::Awaited));
        drop(known);
        let changes = Arc::clone(&self.changes);
        let name = Arc::new(Name { question, policy, answer, asked: OnceLock::new(), changes });
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
    /// The addresses, at least one; those of a host have port 0. Waits only while nothing has ever been
    /// answered; callers bound it.
    pub async fn addresses(&self) -> Result<Arc<[SocketAddr]>> {
        let mut answer = self.answer.subscribe();
        let settled = answer
            .wait_for(|answer| !matches!(answer, Answer::Awaited))
            .await
            .context("wait for the first answer of DNS")?;
        match &*settled {
            Answer::Known(addresses) => Ok(Arc::clone(addresses)),
            Answer::Failed(why) => Err(anyhow!("{} does not resolve: {why}", self.question.name())),
            Answer::Awaited => bail!("{} is not resolved yet", self.question.name()),
        }
    }

    /// The addresses known now, perhaps none; those of a host have port 0.
    pub fn known(&self) -> Arc<[SocketAddr]> {
        match &*self.answer.borrow() {
            Answer::Known(addresses) => Arc::clone(addresses),
            Answer::Awaited | Answer::Failed(_) => Arc::default(),
        }
    }

    /// Whether it points nowhere, or nobody has said for long where.
    pub(super) fn is_lost(&self) -> bool {
        match &*self.answer.borrow() {
            Answer::Known(_) => false,
            Answer::Failed(_) => true,
            Answer::Awaited => self.patience_ends() <= Instant::now(),
        }
    }

    /// Waits for the end of that time.
    pub(super) async fn overdue(&self) {
        sleep_until(self.patience_ends()).await;
    }

    fn patience_ends(&self) -> Instant {
        self.asked.get().copied().unwrap_or_else(Instant::now) + PATIENCE
    }

    async fn keep_true(&self) {
        self.asked.get_or_init(Instant::now);
        let mut targets = Targets::default();
        let mut pause = self.policy.min_ttl;
        let mut failing = None;
        loop {
            match self.ask(&mut targets).await {
                Ok(heard) => {
                    let ttl = heard.ttl;
                    let mut addresses = heard.with(&self.known());
                    addresses.sort_unstable();
                    addresses.dedup();
                    addresses.truncate(MOST_ADDRESSES);
                    self.know(addresses.into());
                    if failing.take().is_some() {
                        info!(name = self.question.name(), "resolves again");
                    }
                    pause = self.policy.min_ttl;
                    sleep(self.about(ttl)).await;
                }
                Err(error) => {
                    let why: Arc<str> = format!("{error:#}").into();
                    self.fail(&why, failing.as_ref() != Some(&why));
                    failing = Some(why);
                    sleep(self.about(pause)).await;
                    pause = (pause * 2).min(self.policy.max_ttl);
                }
            }
        }
    }

    /// Asks once, when it is this name's turn.
    async fn ask(&self, targets: &mut Targets) -> Result<Heard> {
        let turn = TURNS.acquire().await.context("wait for a turn to ask DNS")?;
        let manner = Manner { stale: self.policy.stale, haste: self.known().is_empty() };
        let mut asked = pin!(self.question.ask(manner, targets));
        if let Ok(heard) = timeout(TURN, &mut asked).await {
            return heard;
        }
        drop(turn);
        asked.await
    }

    /// So long, a tenth more or less within the policy's bounds: names that were asked for together spread.
    fn about(&self, ttl: Duration) -> Duration {
        let config::Dns { min_ttl, max_ttl, .. } = self.policy;
        let ttl = ttl.clamp(min_ttl, max_ttl);
        let (least, most) = (ttl.mul_f64(0.9).max(min_ttl), ttl.mul_f64(1.1).min(max_ttl));
        least + most.saturating_sub(least).mul_f64(fastrand::f64())
    }

    fn know(&self, addresses: Arc<[SocketAddr]>) {
        let changed = self.answer.send_if_modified(|answer| {
            // The order is the server's to shuffle; only a different set is news.
            let same = matches!(answer, Answer::Known(known) if *known == addresses);
            if !same {
                *answer = Answer::Known(addresses);
                info!(name = self.question.name(), addresses = %answer, "resolved");
            }
            !same
        });
        if changed {
            self.changes.send_replace(());
        }
    }

    fn fail(&self, why: &Arc<str>, is_news: bool) {
        let name = self.question.name();
        if self.policy.stale && !self.known().is_empty() {
            if is_news {
                warn!(name, addresses = %self, "cannot resolve: {why}; the last good addresses stay in use");
            }
            return;
        }
        if is_news {
            warn!(name, "cannot resolve: {why}; asking again");
        }
        let changed = self.answer.send_if_modified(|answer| {
            let same = matches!(answer, Answer::Failed(known) if known == why);
            if !same {
                *answer = Answer::Failed(Arc::clone(why));
            }
            !same
        });
        if changed {
            self.changes.send_replace(());
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.answer.borrow().fmt(f)
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Awaited => f.write_str("not resolved yet"),
            Self::Failed(why) => write!(f, "does not resolve: {why}"),
            Self::Known(addresses) => {
                let told = |address: &SocketAddr| match address.port() {
                    0 => address.ip().to_string(),
                    _ => address.to_string(),
                };
                f.write_str(&addresses.iter().map(told).collect::<Vec<_>>().join(" "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upstream::balance::Source;

    fn db() -> Question {
        Question::Host("db.invalid".into())
    }

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
        let task = names.all[&db()][0].task.clone().unwrap();
        let same = upstream("{max_ttl: 5s}", &mut names);
        names.ask_for([&*same].into_iter());
        assert_eq!(names.all[&db()][0].task.as_ref().map(AbortHandle::id), Some(task.id()));

        let known: Arc<[SocketAddr]> = Arc::new(["10.0.0.1:0".parse().unwrap()]);
        one.endpoints()[0].name().unwrap().know(Arc::clone(&known));
        let other = upstream("{max_ttl: 9s}", &mut names);
        assert_eq!(other.endpoints()[0].name().unwrap().known(), known);
        names.ask_for([&*other].into_iter());
        assert_eq!(names.all[&db()].len(), 1);
        while !task.is_finished() {
            tokio::task::yield_now().await;
        }
        names.ask_for(std::iter::empty());
        assert!(names.all.is_empty());
    }

    #[test]
    fn a_name_without_an_answer_is_waited_for_only_where_there_is_nothing_better() {
        let text = "{version: 1, routes: [{listen: 1, upstream: u}], \
            upstreams: {u: {endpoints: ['db.invalid:1', '10.0.0.1:1']}}}";
        let resolved = config::Resolved::of_text("c.yaml".as_ref(), text.to_owned()).unwrap();
        let upstream = &resolved.config.routes[0].upstream;
        let upstream = Upstream::new(upstream, None, &mut Names::default());
        let name = upstream.endpoints()[0].name().unwrap();
        let chosen = |tried: &[usize]| Some(upstream.choose(tried, &Source::Pod, None)?.0);
        assert_eq!(chosen(&[]), Some(0));
        name.asked.set(Instant::now() - PATIENCE).unwrap();
        assert_eq!((chosen(&[]), chosen(&[1])), (Some(1), Some(0)));
        name.know(Arc::new(["10.0.0.2:0".parse().unwrap()]));
        assert_eq!(chosen(&[]), Some(0));
        name.answer.send_replace(Answer::Failed("no such name".into()));
        assert_eq!((chosen(&[]), chosen(&[1])), (Some(1), Some(0)));
    }
}

//! The configuration put in force: at the start, and again whenever it changes.
//!
//! All that can fail comes first: parsing, the ladder, `require`, binding. Until then nothing has changed, and
//! what is refused leaves no trace but a line in the log. Then routes are swapped. Connections that are
//! open keep what they were accepted with.
//!
//! None of it is done on a thread that carries bytes.

mod outcome;
pub mod triggers;
mod watch;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Instant, SystemTime};

use anyhow::Result;
use tokio::runtime::Handle;
use tracing::{error, info, warn};

use crate::cli::Source;
use crate::config::{self, Config};
use crate::listeners::{Closing, Listeners, Registered};
use crate::process;
use crate::room::Ladders;
use crate::route::Route;
use crate::service::Service;
use crate::tending::Tending;
use crate::tier::Ladder;
use crate::upstream::Upstream;
use crate::upstream::dns::Names;
pub use outcome::{Changes, Outcome, Refusal};

/// Puts configurations in force, one after the other.
pub struct Reloader {
    pub source: Source,
    pub config: Config,
    pub ladders: Ladders,
    pub names: Names,
    pub tending: Tending,
    pub listeners: Listeners,
    pub service: Arc<Service>,
}

/// What is told of the configuration in force.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub file: Option<PathBuf>,
    pub sha256: Option<String>,
    pub profile: Option<config::Profile>,
    pub at: SystemTime,
    /// What it says that takes a restart.
    pub needs_restart: Vec<String>,
    /// Since then: what was refused last.
    pub refusal: Option<(SystemTime, String)>,
}

impl Reloader {
    /// Puts what it was made with in force, at the addresses that are bound.
    pub fn begin(&mut self, bound: Registered) -> Result<()> {
        let ladders = self.ladders.of(&self.config.routes, &[]);
        self.swap(&ladders, bound).map(drop)
    }

    /// Reads the configuration again, and puts it in force if it is good. Takes a thread of its own.
    pub fn reload(&mut self) -> Outcome {
        let begun = Instant::now();
        let outcome = self.try_reload().map_or_else(Outcome::Refused, Outcome::Done);
        self.service.metrics.reloaded(outcome.name());
        let ms = begun.elapsed().as_millis() as u64;
        match &outcome {
            Outcome::Done(changes) if changes.is_empty() => info!(ms, "{changes}"),
            Outcome::Done(changes) => info!(
                ms,
                added = changes.added.len(),
                changed = changes.changed.len(),
                removed = changes.removed.len(),
                "reloaded"
            ),
            Outcome::Refused(Refusal { why, .. }) => {
                error!(ms, "not reloaded, and what ran before runs on: {why}");
                let mut loaded = self.service.loaded.lock().unwrap_or_else(PoisonError::into_inner);
                loaded.refusal = Some((SystemTime::now(), why.clone()));
            }
        }
        outcome
    }

    fn try_reload(&mut self) -> Result<Changes, Refusal> {
        let config::Resolved { mut config, warnings, sha256, .. } =
            self.source.read().map_err(Refusal::bad)?;
        let needs_restart = keep_for_good(&self.config, &mut config);
        let before = self.service.routes();
        let ladders = self.ladders.of(&config.routes, &before);
        self.ladders.satisfy(&config, &ladders).map_err(Refusal::missing_tier)?;
        let bound = self.listeners.bind(&config.routes).map_err(Refusal::failed)?;

        warnings.iter().for_each(|warning| warn!("{warning}"));
        for key in &needs_restart {
            warn!("{key} has changed, which needs a restart: until then it stays as it was");
        }
        let settings = settings_that_differ(&self.config, &config);
        let opened = !bound.is_empty();
        if config.profile != self.config.profile {
            config.profile.iter().for_each(|profile| info!("{profile}"));
        }
        self.config = config;
        match self.swap(&ladders, bound) {
            Ok(closing) => Handle::current().block_on(closing.done()),
            Err(error) => error!("the kernel does not carry everything that it could: {error:#}"),
        }
        let changes = Changes::between(&before, &self.service.routes(), settings, needs_restart);
        if opened || !changes.is_empty() {
            allow_open_files(&self.config);
        }
        *self.service.loaded.lock().unwrap_or_else(PoisonError::into_inner) = Loaded {
            file: self.source.file(),
            sha256,
            profile: self.config.profile.clone(),
            at: SystemTime::now(),
            needs_restart: changes.needs_restart.clone(),
            refusal: None,
        };
        Ok(changes)
    }

    /// Puts the configuration in force. An error is one of the kernel's tables; all else has happened then.
    fn swap(&mut self, ladders: &[Arc<Ladder>], bound: Registered) -> Result<Closing> {
        let routes: Arc<[_]> = self.routes(ladders).into();
        self.names.ask_for(routes.iter().map(|route| &*route.upstream));
        self.tending.look_after(routes.iter().map(|route| &route.upstream));
        self.service.replace(Arc::clone(&routes));
        // Before the kernel leads anybody anywhere, because whatever it does not take comes to a listener.
        self.listeners.open(&routes, bound);
        let followed = self.service.follow();
        let closing = self.listeners.close_others(&routes);
        self.service.standings.sweep();
        followed.map(|()| closing)
    }

    /// The routes of the configuration: those that are running where nothing about them differs.
    fn routes(&mut self, ladders: &[Arc<Ladder>]) -> Vec<Arc<Route>> {
        let before = self.service.routes();
        let routes_before: HashMap<_, _> = before.iter().map(|it| (&it.name, it)).collect();
        let upstreams_before: HashMap<_, _> =
            before.iter().map(|it| (&it.upstream.name, &it.upstream)).collect();
        // Routes to one upstream share it, and with it the counts that balancing goes by.
        let mut upstreams: HashMap<_, Arc<Upstream>> = HashMap::new();
        let routes = self.config.routes.iter().zip(ladders).map(|(meant, ladder)| {
            let upstream = upstreams.entry(Arc::as_ptr(&meant.upstream)).or_insert_with(|| {
                match upstreams_before.get(&meant.upstream.name) {
                    Some(same) if *same.meant() == meant.upstream => Arc::clone(same),
                    before => {
                        Upstream::new(&meant.upstream, before.map(|it| &***it), &mut self.names)
                    }
                }
            });
            if let Some(same) = routes_before.get(&meant.name)
                && same.is(meant, ladder)
                && Arc::ptr_eq(&same.upstream, upstream)
            {
                return Arc::clone(same);
            }
            let choice = || ladder.choose(meant, meant.tier);
            let standing = self.service.standings.of(&meant.name, &self.service.metrics, choice);
            let labels: HashSet<_> = upstream.endpoints().iter().map(|it| &**it.label()).collect();
            standing.metrics.keep_endpoints(|endpoint| labels.contains(endpoint));
            Route::new(meant, Arc::clone(upstream), Arc::clone(ladder), standing)
        });
        routes.collect()
    }
}

/// Leaves what only a start can change as it was, and tells the keys of it that differ.
fn keep_for_good(running: &Config, new: &mut Config) -> Vec<String> {
    let (old, it) = (&running.acceleration, &new.acceleration);
    let keys = [
        ("admin.http", running.admin.http != new.admin.http),
        ("admin.control", running.admin.control != new.admin.control),
        ("admin.ready_when", running.admin.ready_when != new.admin.ready_when),
        ("acceleration.cgroup", old.cgroup != it.cgroup),
        ("acceleration.instance", old.instance != it.instance),
        ("acceleration.stale_after", old.stale_after != it.stale_after),
        ("acceleration.inflight_bytes", old.inflight.bytes != it.inflight.bytes),
        ("acceleration.inflight_messages", old.inflight.messages != it.inflight.messages),
    ];
    new.admin = running.admin.clone();
    new.acceleration =
        config::Acceleration { tier: it.tier, require: it.require, ..running.acceleration.clone() };
    keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key.to_owned()).collect()
}

/// The keys that differ, apart from routes.
fn settings_that_differ(running: &Config, new: &Config) -> Vec<String> {
    let (old, it) = (&running.acceleration, &new.acceleration);
    let keys = [
        ("drain", running.drain != new.drain),
        ("environment", running.profile != new.profile),
        ("acceleration.tier", old.tier != it.tier),
        ("acceleration.require", old.require != it.require),
    ];
    keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key.to_owned()).collect()
}

/// A connection takes two descriptors and a pipe's share.
pub fn allow_open_files(config: &Config) {
    let wanted: u64 =
        config.routes.iter().map(|route| 2 * u64::from(route.max_connections.get())).sum();
    match process::raise_open_file_limit() {
        Ok(limit) if wanted > limit => info!(
            "{limit} open files are allowed, which is {} connections; max_connections of all routes \
             is {}",
            limit / 2,
            wanted / 2
        ),
        Ok(_) => {}
        Err(error) => warn!("cannot raise the limit of open files: {error}"),
    }
}

//! What each tier reaches on this node, and what that means for a route, in some ten seconds.
//!
//! `cargo xtask bench` measures at length, beside other proxies, by the same loads.

pub mod advice;
pub mod cpu;
pub mod latency;
pub mod load;
pub mod pattern;
pub mod progress;
pub mod proxy;
pub mod report;
pub mod results;
pub mod rounds;
pub mod stage;
pub mod summary;
pub mod table;
pub mod upstream;

use std::future;
use std::io::{self, IsTerminal, Write, stderr};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::task::Poll;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{BenchArgs, ConfigArgs};
use crate::config::{
    self, Acceleration, Cgroup, Config, ConfigError, Environment, InFlight, Problem, Tier, nearest,
    quote,
};
use crate::datapath::kernel;
use crate::doctor;
use crate::tier::Ladder;
use advice::Subject;
use cpu::{Cpus, Strangers};
use progress::Progress;
use report::{Circumstances, Report};
use stage::{Stage, Way};
use upstream::Upstream;

/// A plain route, where none is asked about: it is never opened.
const PLAIN: &str = "plain:127.0.0.1:1=127.0.0.1:2";

/// Measures, with progress on standard error.
pub fn bench(args: &BenchArgs) -> Result<Report> {
    let start = Instant::now();
    let deadline = start + args.time;
    let Question { route, named, require, cgroup, inflight } = Question::read(args)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut stops = {
        let _context = runtime.enter();
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let stops = kinds.map(signal).into_iter().collect::<io::Result<Vec<_>>>();
        stops.context("watch for signals")?
    };
    let ladder = Ladder::probe(doctor::kernel_tiers(&kernel::examine(&cgroup)));
    // As in the other benchmark: clients and proxies share a CPU, and the server has another. Wherever the
    // scheduler put them it would be that, and not the tiers, that makes the difference.
    let cpus = Cpus::choose()?;
    let strangers = Strangers::watch(cpus)?;
    cpu::pin(cpus.upstream)?;
    let upstream = Upstream::start(Ipv4Addr::LOCALHOST.into())?;
    cpu::pin(cpus.pod)?;
    // By this thread, because what is started ends with the one that started it.
    let mut stage = Stage::set(&ladder, &cgroup, inflight, upstream.address());
    let ways = stage.ways.clone();
    let progress = announce(&ways, deadline);
    let measuring = runtime.spawn_blocking(move || rounds::measure(&ways, deadline, progress));
    let stopped = future::poll_fn(|context| {
        let stopped = stops.iter_mut().any(|stop| stop.poll_recv(context).is_ready());
        if stopped { Poll::Ready(()) } else { Poll::Pending }
    });
    let measured = runtime.block_on(async {
        tokio::select! {
            () = stopped => None,
            results = measuring => Some(results),
        }
    });
    let Some(results) = measured else {
        // Both are under way with each other, and end with the process.
        runtime.shutdown_background();
        std::mem::forget(upstream);
        bail!("interrupted");
    };
    let results = results.context("measure")?;
    let subject = Subject {
        route: named.then(|| route.name.to_string()),
        choice: ladder.choose(&route, route.tier),
        limit: route.tier,
        required: require,
    };
    let (ways, missing) = (stage.ways.clone(), std::mem::take(&mut stage.missing));
    let troubles = stage.troubles();
    // What they have taken is known to be ours once they have ended.
    drop(stage);
    let strangers = strangers.share()?;
    let took = start.elapsed();
    Ok(Report::new(&ways, &results, &subject, Circumstances { missing, troubles, strangers, took }))
}

/// What is asked about.
struct Question {
    route: config::Route,
    /// Whether it is one of the user's.
    named: bool,
    require: Option<Tier>,
    cgroup: Cgroup,
    inflight: InFlight,
}

impl Question {
    fn read(args: &BenchArgs) -> Result<Self, ConfigError> {
        let config = |file: Option<&PathBuf>, route: Option<&str>, environment: &Environment| {
            let routes = route.map(str::to_owned).into_iter().collect();
            ConfigArgs { config: file.cloned(), routes, ..ConfigArgs::default() }.load(environment)
        };
        let (config, name) = match args.route.as_deref() {
            None => (config(None, Some(PLAIN), &Environment::default())?.0, None),
            Some(route) => {
                let environment = Environment::of_process();
                // A name has no such sign, and a definition does not go without.
                let defined = Some(route).filter(|route| route.contains('='));
                let (config, _) = config(args.config.as_ref(), defined, &environment)?;
                (config, Some(route).filter(|_| defined.is_none()))
            }
        };
        let route = match name {
            // What flags define comes first.
            None => config.routes.first(),
            Some(name) => config.routes.iter().find(|route| *route.name == *name),
        };
        let Some(route) = route.cloned() else {
            return Err(unknown(name.unwrap_or_default(), &config));
        };
        let cgroup = args.cgroup.clone().unwrap_or(config.acceleration.cgroup);
        let Acceleration { require, inflight, .. } = config.acceleration;
        Ok(Self { route, named: args.route.is_some(), require, cgroup, inflight })
    }
}

fn unknown(name: &str, config: &Config) -> ConfigError {
    let what = format!("there is no route {}", quote(name));
    let known = || config.routes.iter().map(|route| &*route.name);
    let problem = match nearest(name, known()) {
        Some(near) => Problem::slip(what, near),
        None => Problem::new(what, format!("there are {}", known().collect::<Vec<_>>().join(", "))),
    };
    problem.at(&config::Place::named("--route"))
}

/// Says what begins: step by step on a terminal, else once.
fn announce(ways: &[Way], deadline: Instant) -> Option<Progress> {
    if stderr().is_terminal() {
        return Some(Progress::new(rounds::steps(ways.len())));
    }
    let ways: Vec<_> = ways.iter().map(Way::name).collect();
    let left = deadline.saturating_duration_since(Instant::now()).as_secs_f64();
    // Nobody to tell when it is closed.
    let _ = writeln!(stderr(), "ambassador: measuring {} for {left:.0} s", ways.join(", "));
    None
}

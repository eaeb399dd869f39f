//! Whether the kernel tiers do here what they have to: tried with real sockets, on the very programs and
//! maps that are to serve, before any app depends on them.
//!
//! The start of the ambassador and `doctor` make the same checks; they differ in what the one of many bytes
//! may take ([`Extent`]). Only `doctor` asks what apps can notice, and detaches in the end. What is tried at
//! the start leaves no trace in the maps.

mod bytes;
mod direct;
mod noticed;
mod relayed;
mod sockmap;

use std::fmt;
use std::io::ErrorKind;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::SockRef;

use super::cgroup::Visit;
use super::kernel;
use super::programs::{Links, Maps, Programs};
use super::tables::Tables;

/// For any single step; all of it is on loopback, but the CPU may be lent to others in between.
const STEP: Duration = Duration::from_secs(1);

/// One thing that was tried.
#[derive(Debug)]
pub struct Check {
    pub name: &'static str,
    pub outcome: Outcome,
}

/// What became of a check.
#[derive(Debug)]
pub enum Outcome {
    Passed,
    /// It cannot be tried here, for a reason that is no fault of the tier.
    Skipped(String),
    Failed(String),
}

/// What apps can notice of a tier: no failure.
#[derive(Debug)]
pub struct Fact {
    pub name: &'static str,
    /// Or why that is not known.
    pub holds: Result<bool, String>,
}

/// How much is tried. A check for which there is no time left has failed.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// For all checks together.
    time: Duration,
    /// Bytes that are sent through a connection and compared, or fewer where they take long.
    bytes: u64,
    /// Whether facts are wanted.
    facts: bool,
}

impl Extent {
    /// Before the ambassador uses a tier: whoever waits for it should not notice. It takes some milliseconds;
    /// the limit is what tells a hang from a busy node, on which no tier should be lost.
    pub const START: Self = Self { time: Duration::from_secs(5), bytes: 1024 * 1024, facts: false };
    /// For somebody who wants to know.
    pub const DOCTOR: Self =
        Self { time: Duration::from_millis(1500), bytes: 64 * 1024 * 1024, facts: true };
}

/// What was found out.
pub struct Found {
    /// Or why that tier was not tried.
    pub direct: Result<Vec<Check>, String>,
    /// The same.
    pub sockmap: Result<Vec<Check>, String>,
    /// Whether an enrolled client is told how many bytes wait to be read, as any other is. Where it is
    /// not, some apps that are non-blocking notice too.
    pub counts_waiting_bytes: bool,
    /// Of clients that `sockmap` has enrolled, if they are wanted.
    pub facts: Vec<Fact>,
}

impl Found {
    /// Why `direct` cannot be used, if it cannot.
    pub fn no_direct(&self) -> Option<String> {
        why_not(&self.direct)
    }

    /// Why `sockmap` cannot be used, if it cannot.
    pub fn no_sockmap(&self) -> Option<String> {
        why_not(&self.sockmap)
    }
}

/// Tries the attached programs in their cgroup, of each tier unless there is a reason not to. Links are those that
/// keep them attached, if that is to end. An error if nothing could be tried at all.
pub fn run(
    maps: &Maps,
    programs: &Programs,
    cgroup: &Path,
    extent: Extent,
    links: Option<Links>,
) -> Result<Found> {
    let clock = Clock::new(extent.time);
    let (mut tables, ends) = Tables::new(&mut maps.duplicate()?)?;
    tables.found(kernel::settings(cgroup)?)?;
    // Clients are enrolled while that holds.
    tables.renew(Some(extent.time))?;
    let cannot = |error: anyhow::Error| format!("it cannot be tried: {error:#}");
    let for_sockmap = match programs.no_sockmap() {
        Some(why) => Err(why.to_owned()),
        None => sockmap::Bench::new(&mut maps.duplicate()?, clock, extent.bytes).map_err(cannot),
    };
    let mut for_direct = match programs.no_direct() {
        Some(why) => Err(why.to_owned()),
        None => direct::Bench::new(&mut maps.duplicate()?, clock).map_err(cannot),
    };
    // Where the ambassador is a part of the Pod, it is in the Pod's cgroup already.
    let is_inside = match &for_direct {
        Ok(bench) => bench.redirects().is_ok(),
        Err(_) => for_sockmap.as_ref().is_ok_and(|bench| bench.enrolled().is_ok()),
    };
    let _visit = if is_inside { None } else { Some(Visit::below(cgroup)?) };
    let mut direct = for_direct.as_mut().map(direct::Bench::try_all).map_err(|why| why.clone());
    tables.empty()?;
    tables.renew(Some(extent.time))?;
    let mut sockmap = for_sockmap.as_ref().map(sockmap::Bench::try_all).map_err(String::clone);
    let tried = for_sockmap.as_ref().ok();
    let counts_waiting_bytes = tried.is_some_and(|it| it.counts_waiting_bytes().unwrap_or(false));
    let facts = tried.filter(|_| extent.facts).map(sockmap::Bench::facts).unwrap_or_default();
    tables.close()?;
    let mut enrols_nobody = |name| {
        if let (Ok(bench), Ok(checks)) = (&for_sockmap, &mut sockmap) {
            checks.push(clock.check(name, || bench.enrols_nobody()));
        }
    };
    enrols_nobody("no client is enrolled once that is over");
    if let Some(links) = links {
        let bench = direct::Bench::new(&mut maps.duplicate()?, clock)?;
        drop(links);
        if let Ok(checks) = &mut direct {
            let name = "nothing is redirected once all is detached";
            checks.push(clock.check(name, || bench.leaves_everybody_alone()));
        }
        enrols_nobody("no client is enrolled once all is detached");
        tables.close()?;
    }
    // The ends of what was tried.
    ends.for_each(drop);
    Ok(Found { direct, sockmap, counts_waiting_bytes, facts })
}

/// What kept a tier from being tried, or its first failure.
fn why_not(tried: &Result<Vec<Check>, String>) -> Option<String> {
    match tried {
        Err(why) => Some(why.clone()),
        Ok(checks) => checks.iter().find_map(|Check { name, outcome }| match outcome {
            Outcome::Failed(why) => Some(format!("the self-test failed: {name}: {why}")),
            Outcome::Passed | Outcome::Skipped(_) => None,
        }),
    }
}

/// The error of a check that cannot be tried here.
#[derive(Debug)]
struct Skip(String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// The time that all checks have together.
#[derive(Debug, Clone, Copy)]
struct Clock {
    end: Instant,
}

impl Clock {
    fn new(time: Duration) -> Self {
        Self { end: Instant::now() + time }
    }

    fn left(self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// For a step that begins now: never nothing, which sockets take for no limit.
    fn step(self) -> Duration {
        STEP.min(self.left()).max(Duration::from_millis(1))
    }

    fn check(self, name: &'static str, attempt: impl FnOnce() -> Result<()>) -> Check {
        let tried = if self.left().is_zero() {
            Err(anyhow::anyhow!("there was no time left to try it"))
        } else {
            attempt()
        };
        let outcome = match tried {
            Ok(()) => Outcome::Passed,
            Err(error) if error.is::<Skip>() => Outcome::Skipped(format!("{error:#}")),
            Err(error) => Outcome::Failed(format!("{error:#}")),
        };
        Check { name, outcome }
    }

    /// What comes of something that is there by now, as on loopback, or within the time that another CPU
    /// takes; or an error in these words.
    fn wait<T>(
        self,
        missing: &'static str,
        mut attempt: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + self.step();
        loop {
            if let Some(there) = attempt()? {
                return Ok(there);
            }
            ensure!(Instant::now() < deadline, missing);
            thread::yield_now();
        }
    }

    /// The connection that has been made to a listener.
    fn accepted(self, listener: &TcpListener) -> Result<TcpStream> {
        self.wait("nobody is there", || self.arrived(listener))
    }

    fn arrived(self, listener: &TcpListener) -> Result<Option<TcpStream>> {
        let (stream, _) = match listener.accept() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            accepted => accepted.context("accept a connection")?,
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(self.step()))?;
        Ok(Some(stream))
    }
}

fn reset(stream: impl AsFd) -> Result<()> {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).context("reset")
}

fn listen(address: impl Into<IpAddr>) -> Result<TcpListener> {
    let listener = TcpListener::bind((address.into(), 0)).context("listen on loopback")?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

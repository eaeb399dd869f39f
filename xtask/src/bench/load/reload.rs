//! Reloads, some each second, and what traffic on routes that stay notices of them.
//!
//! Requests are due at fixed times and each is timed from when it was due: what has to wait because something
//! before it did is late too.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ambassador::bench::latency::Latency;
use ambassador::bench::load::round_trips::round_trip;
use ambassador::bench::load::{STALL, connect};
use anyhow::{Context, Error, Result, ensure};

use super::Target;
use crate::bench::subject::reload::{Move, Reload};

/// Connections that stay open through the reloads.
const ESTABLISHED: usize = 8;
/// How often a request is due on one of them, and one on a connection of its own: together about half of
/// what a CPU can do, so that a reload finds one as an app at work leaves it.
const ON_ESTABLISHED: Duration = Duration::from_micros(250);
const ON_ITS_OWN: Duration = Duration::from_millis(1);
/// Requests that are not timed: the first ones find cold caches.
const WARM_UP: Duration = Duration::from_millis(200);
/// How often to look whether the route has moved: that exact a reload is timed.
const GLANCE: Duration = Duration::from_millis(1);
/// From one reload to the next. HAProxy 2.6 starts its master over twice, and a signal that comes in between
/// is lost.
const REST: Duration = Duration::from_millis(250);
/// A reload that takes longer than this has failed.
const LONGEST: Duration = Duration::from_secs(10);

/// What came of it.
pub(crate) struct Reloaded {
    /// How long a reload took, as a median, if there is a proxy.
    pub(crate) took: Option<Duration>,
    /// How long requests took before the first reload.
    pub(crate) before: Latency,
    /// And from then on: the rest after each reload included, because its work may go on.
    pub(crate) meanwhile: Latency,
}

/// A request that was answered.
struct Request {
    due: Instant,
    took: Duration,
}

/// Sends requests for `time`, and then reloads for as long. A request that fails, or a connection that is
/// refused or cut, fails the load.
pub(crate) fn run(target: &Target, time: Duration) -> Result<Reloaded> {
    // The last one moves, but where there is no proxy there is only one.
    let staying = target.addresses.len().saturating_sub(1).max(1);
    let stay = &target.addresses[..staying];
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let traffic = [
            scope.spawn(|| on_established(stay, &stop)),
            scope.spawn(|| on_their_own(stay, &stop)),
        ];
        thread::sleep(WARM_UP);
        let start = Instant::now();
        thread::sleep(time);
        let first = Instant::now();
        let reloads = match &target.reload {
            Some(reload) => reload_for(time, reload),
            None => {
                thread::sleep(time);
                Ok(Vec::new())
            }
        };
        let end = Instant::now();
        stop.store(true, Ordering::Relaxed);
        let mut requests = Vec::new();
        for client in traffic {
            let served = client.join().expect("a client does not panic");
            requests.extend(served.context("serve others while routes are reloaded")?);
        }
        let mut reloads = reloads?;
        reloads.sort_unstable();
        let due = |from, to| {
            let within = requests.iter().filter(|it| (from..to).contains(&it.due));
            Latency::of(within.map(|it| it.took).collect())
        };
        Ok(Reloaded {
            took: reloads.get(reloads.len() / 2).copied(),
            before: due(start, first),
            meanwhile: due(first, end),
        })
    })
}

/// How long each reload took from the signal on, until all of it was in force.
fn reload_for(time: Duration, reload: &Reload) -> Result<Vec<Duration>> {
    let start = Instant::now();
    let mut took = Vec::new();
    while took.is_empty() || start.elapsed() < time {
        let change = reload.prepare(took.len())?;
        let told = Instant::now();
        reload.signal()?;
        while !is_in_force(&change)? {
            ensure!(told.elapsed() < LONGEST, "a reload was not in force in {LONGEST:?}");
            thread::sleep(GLANCE);
        }
        took.push(told.elapsed());
        thread::sleep(REST);
    }
    Ok(took)
}

/// Whether the route answers where it is now, and nobody listens where it was.
fn is_in_force(change: &Move) -> Result<bool> {
    let mut stream = match connect(change.to) {
        Err(error) if is_refusal(&error) => return Ok(false),
        connected => connected?,
    };
    round_trip(&mut stream, 0).context("use a route that has moved")?;
    let left = TcpStream::connect_timeout(&change.from, STALL);
    Ok(left.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused))
}

fn is_refusal(error: &Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

fn on_established(addresses: &[SocketAddr], stop: &AtomicBool) -> Result<Vec<Request>> {
    let connected = addresses.iter().cycle().take(ESTABLISHED).map(|&address| connect(address));
    let mut streams = connected.collect::<Result<Vec<_>>>()?;
    paced(ON_ESTABLISHED, stop, |number| {
        let stream = &mut streams[number % ESTABLISHED];
        round_trip(stream, number as u64).context("use a connection that was open before")
    })
}

fn on_their_own(addresses: &[SocketAddr], stop: &AtomicBool) -> Result<Vec<Request>> {
    paced(ON_ITS_OWN, stop, |number| {
        let mut stream = connect(addresses[number % addresses.len()])?;
        round_trip(&mut stream, number as u64).context("use a connection for one reply")
    })
}

/// Makes a request whenever one is due, or as soon as the one before is answered.
fn paced(
    every: Duration,
    stop: &AtomicBool,
    mut request: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Request>> {
    // Or each sleep is 50 µs longer.
    rustix::thread::set_current_timer_slack(NonZeroU64::new(1)).context("have exact timers")?;
    let mut requests = Vec::new();
    let mut due = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        request(requests.len())?;
        requests.push(Request { due, took: due.elapsed() });
        due += every;
    }
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use ambassador::bench::upstream::Upstream;

    use super::*;

    #[test]
    fn a_route_has_moved_once_it_answers_there_and_nowhere_else() {
        let upstream = Upstream::start(Ipv4Addr::LOCALHOST.into()).expect("start an upstream");
        let here = upstream.address();
        let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("listen");
        let there = other.local_addr().expect("read the address");
        let moved = |from, to| is_in_force(&Move { from, to }).expect("an answer");
        assert!(!moved(there, here), "both listen");
        drop(other);
        assert!(moved(there, here));
        assert!(!moved(here, there), "nobody listens there");
    }

    #[test]
    fn what_waits_for_another_is_late_too() {
        let stop = AtomicBool::new(false);
        let stall = Duration::from_millis(50);
        let served = paced(Duration::from_millis(1), &stop, |number| {
            if number == 0 {
                thread::sleep(stall);
            }
            stop.store(number == 10, Ordering::Relaxed);
            Ok(())
        });
        let served = served.expect("requests");
        assert_eq!(served.len(), 11);
        assert!(served.iter().all(|request| request.took >= stall / 2));
    }

    #[test]
    fn one_that_fails_fails_them_all() {
        let stop = AtomicBool::new(false);
        let served = paced(Duration::ZERO, &stop, |number| {
            ensure!(number < 3, "refused");
            Ok(())
        });
        assert_eq!(served.err().expect("one failed").to_string(), "refused");
    }
}

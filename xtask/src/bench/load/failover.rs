//! A primary that fails under a pool of connections: until the pool is served by the standby, and what that costs.

use std::thread;
use std::time::{Duration, Instant, SystemTime};

use ambassador_tests::pool::{Call, Dialect, End, Pool};
use anyhow::{Context, Result, ensure};

use super::Target;

/// Connections of the pool.
const MEMBERS: usize = 16;
/// How long an app waits for a connection, and for an answer: longer than it takes to find out by checks, or
/// chance would say whether a connection comes back before that.
const PATIENCE: Duration = Duration::from_secs(2);
/// Served by the primary, until its checks are what they always are.
const BEFORE: Duration = Duration::from_secs(1);
/// Of checks that begin every so often, the failure comes at any time in between.
const INTERVAL: Duration = Duration::from_millis(500);
/// Served by the standby: what fails then still counts.
const AFTERWARDS: Duration = Duration::from_millis(700);

/// What it cost.
pub(crate) struct FailedOver {
    /// From the failure to the first answer of the standby.
    pub(crate) first: Duration,
    /// To the first answer of the standby on the last connection to get one.
    pub(crate) all: Duration,
    /// Calls that failed, and those among them that found nobody to connect to.
    pub(crate) failed: usize,
    pub(crate) not_connected: usize,
}

/// Runs a pool; an answer that is wrong, or none of the standby, fails the load.
pub(crate) fn run(target: &Target, dialect: Dialect) -> Result<FailedOver> {
    let (failing, standby) = target.failing.as_deref().context("find a server that can fail")?;
    let address = *target.addresses.first().context("find the route")?;
    let mut pool = Pool::start(address, dialect, MEMBERS, PATIENCE);
    pool.until_served_by(failing.address.port())?;
    let now = SystemTime::UNIX_EPOCH.elapsed().context("read the clock")?;
    thread::sleep(
        BEFORE + Duration::from_nanos(now.as_nanos() as u64 % INTERVAL.as_nanos() as u64),
    );
    let failed = Instant::now();
    failing.fail()?;
    pool.until_served_by(standby.port())?;
    thread::sleep(AFTERWARDS);
    let calls = pool.end()?;
    summed(&calls, failed, standby.port())
}

fn summed(calls: &[Call], failure: Instant, standby: u16) -> Result<FailedOver> {
    let failed = |call: &&Call| !matches!(call.end, End::Answered(_));
    let (before, after): (Vec<Call>, Vec<Call>) =
        calls.iter().partition(|call| call.ended < failure);
    let early = before.iter().filter(failed).count();
    ensure!(early == 0, "{early} calls failed before the server did");
    let first_of = |member| {
        let mut answers =
            after.iter().filter(|call| call.member == member && call.end == End::Answered(standby));
        answers.next().map(|call| call.ended - failure)
    };
    let firsts: Option<Vec<Duration>> = (0..MEMBERS).map(first_of).collect();
    let firsts = firsts.context("find an answer of the standby for each connection")?;
    Ok(FailedOver {
        first: firsts.iter().copied().min().unwrap_or_default(),
        all: firsts.iter().copied().max().unwrap_or_default(),
        failed: after.iter().filter(failed).count(),
        not_connected: after.iter().filter(|call| call.end == End::NotConnected).count(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_runs_from_the_failure_to_the_standbys_answers() {
        let failure = Instant::now();
        let call = |member, after: u64, end| Call {
            member,
            ended: failure + Duration::from_millis(after),
            end,
        };
        let mut calls = vec![
            call(0, 1, End::Answered(1)),
            call(0, 2, End::Failed),
            call(0, 3, End::NotConnected),
        ];
        calls.extend((0..MEMBERS).map(|member| call(member, 10 + member as u64, End::Answered(2))));
        let told = summed(&calls, failure, 2).expect("an answer each");
        assert_eq!((told.first.as_millis(), told.all.as_millis()), (10, 9 + MEMBERS as u128));
        assert_eq!((told.failed, told.not_connected), (2, 1));
        assert!(summed(&calls, failure, 3).is_err());
        let later = failure + Duration::from_millis(5);
        assert!(summed(&calls, later, 2).is_err(), "what failed before is not of the failure");
    }
}

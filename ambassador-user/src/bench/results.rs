//! What came out: every sample of each load on each way, and what they come to.

use std::time::Duration;

use anyhow::Result;

use super::latency::Latency;
use super::load::transfer::{self, Direction, Moved};
use super::load::{Served, connections, round_trips};
use super::stage::Way;
use super::summary::Summary;

/// So many rounds, or fewer where there is no time: odd, for the median, and enough to tell chance.
pub const ROUNDS: usize = 7;
/// With fewer rounds that agree, it may be chance.
pub const ENOUGH: usize = 5;
/// Less than that is no difference, however steady.
const SLIGHT: f64 = 0.03;

/// What is done, in the order of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// Small messages there and back, on so many connections.
    RoundTrips(usize),
    /// As much as one connection takes.
    Transfer(Direction),
    /// Connect, one round trip, close.
    Connections,
}

/// All loads.
pub const LOADS: [Load; 5] = [
    Load::RoundTrips(1),
    Load::RoundTrips(16),
    Load::Transfer(Direction::Up),
    Load::Transfer(Direction::Down),
    Load::Connections,
];

/// One load on one way, once.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Requests or bytes in a second.
    pub rate: f64,
    /// Half of the requests took at most so many microseconds, and all but one in a hundred.
    pub latency: Option<[f64; 2]>,
    /// What the ambassador took of a CPU for a request or a byte, in seconds.
    pub cpu: Option<f64>,
}

/// One load on one way: a sample a round, or why it failed.
pub type Samples = Result<Vec<Sample>, String>;

/// All loads on all ways: a row a load, in it the ways.
#[derive(Debug, Clone)]
pub struct Results(pub Vec<Vec<Samples>>);

/// How one way compares with another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Difference {
    /// One of them has failed, or there are too few rounds.
    Unknown,
    /// None that is more than chance.
    None,
    /// So many times the rate of the other.
    Times(f64),
}

impl Load {
    /// What there is more or less of, for a sentence.
    pub fn noun(self) -> String {
        match self {
            Self::RoundTrips(1) => "round trips on 1 connection".to_owned(),
            Self::RoundTrips(count) => format!("round trips on {count} connections"),
            Self::Transfer(Direction::Up) => "upload".to_owned(),
            Self::Transfer(Direction::Down) => "download".to_owned(),
            Self::Connections => "new connections".to_owned(),
        }
    }

    /// What there is so much of in a second.
    pub fn unit(self) -> &'static str {
        if matches!(self, Self::Transfer(_)) { "GB/s" } else { "/s" }
    }

    /// How much CPU time is told for how much work.
    pub fn work(self) -> &'static str {
        if matches!(self, Self::Transfer(_)) { "s/GB" } else { "s/10k" }
    }

    /// The same as numbers of bytes or requests.
    pub fn scale(self) -> (f64, f64) {
        if matches!(self, Self::Transfer(_)) { (1e9, 1e9) } else { (1.0, 1e4) }
    }

    /// Does it for about so long; a transfer, which is given in bytes, by what it reached before.
    pub fn run(self, way: &Way, time: Duration, bytes: u64) -> Result<Sample> {
        match self {
            Self::RoundTrips(count) => Ok(Sample::served(round_trips::run(way, count, 64, time)?)),
            Self::Connections => Ok(Sample::served(connections::run(way, time)?)),
            Self::Transfer(direction) => {
                let Moved { took, spent } = transfer::run(way, direction, bytes, 1)?;
                let rate = bytes as f64 / took.as_secs_f64();
                Ok(Sample { rate, latency: None, cpu: each(spent, bytes) })
            }
        }
    }
}

impl Sample {
    fn served(served: Served<Option<Duration>>) -> Self {
        let Served { count, per_second, latency, spent } = served;
        let at = |part| Latency::at(&latency, part);
        let latency = at(0.5).zip(at(0.99)).map(<[f64; 2]>::from);
        Self { rate: per_second, latency, cpu: each(spent, count) }
    }
}

fn each((before, after): (Option<Duration>, Option<Duration>), count: u64) -> Option<f64> {
    // A thread that has ended takes what it had taken out of the sum.
    let spent = after?.saturating_sub(before?);
    Some(spent.as_secs_f64() / count as f64)
}

impl Results {
    /// A figure of all rounds, if there is one.
    pub fn summary(samples: &[Sample], figure: impl Fn(&Sample) -> Option<f64>) -> Option<Summary> {
        Summary::of(samples.iter().filter_map(figure).collect())
    }

    /// How often each load was done.
    pub fn rounds(&self) -> usize {
        let done = self.0.iter().flatten().filter_map(|it| it.as_ref().ok()).map(Vec::len);
        done.max().unwrap_or(0)
    }

    /// How a way compares with another in a load. Both are measured one soon after the other in each round,
    /// so each round tells; only if all agree it is a difference.
    pub fn difference(&self, load: usize, way: usize, other: usize) -> Difference {
        let (Ok(one), Ok(other)) = (&self.0[load][way], &self.0[load][other]) else {
            return Difference::Unknown;
        };
        let ratios = one.iter().zip(other).map(|(one, other)| one.rate / other.rate);
        let Some(all) = Summary::of(ratios.collect()) else { return Difference::Unknown };
        if one.len().min(other.len()) < ENOUGH {
            return Difference::Unknown;
        }
        let steady = all.lowest > 1.0 || all.highest < 1.0;
        if steady && (all.median - 1.0).abs() > SLIGHT {
            Difference::Times(all.median)
        } else {
            Difference::None
        }
    }
}

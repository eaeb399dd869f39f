//! The measurement: every load on every way, round after round, so that whatever else the node does falls on
//! all of them alike.

use std::time::{Duration, Instant};

use super::load::transfer::Direction;
use super::progress::Progress;
use super::results::{LOADS, Load, ROUNDS, Results, Samples};
use super::stage::Way;

/// A measurement is no shorter, however little time there is.
const SHORTEST: Duration = Duration::from_millis(4);
/// What a transfer begins with, and its bounds.
const BYTES: (u64, u64) = (1 << 20, 4 << 30);
/// Of a measurement's share of the time, so much is measured; the rest is for its beginning and end.
const TIMED: f64 = 0.7;

/// Measures until the deadline: at most [`ROUNDS`], and at least one, whatever it takes.
pub fn measure(ways: &[Way], deadline: Instant, mut progress: Option<Progress>) -> Results {
    let mut results = Results(vec![vec![Ok(Vec::new()); ways.len()]; LOADS.len()]);
    let mut bytes = vec![vec![BYTES.0; ways.len()]; LOADS.len()];
    let measurements = LOADS.len() * ways.len();
    // The first round finds everything cold, and out how fast transfers are: it does not count.
    for round in 0..=ROUNDS {
        let start = Instant::now();
        let left = deadline.saturating_duration_since(start);
        let share = left / u32::try_from((ROUNDS + 1 - round) * measurements).unwrap_or(u32::MAX);
        let time = share.mul_f64(TIMED).max(SHORTEST);
        for (row, load) in LOADS.into_iter().enumerate() {
            for (column, way) in ways.iter().enumerate() {
                if let Some(progress) = &mut progress {
                    progress.step(&format!("{} by {}", load.noun(), way.name()));
                }
                let samples = &mut results.0[row][column];
                one(load, way, time, &mut bytes[row][column], samples);
                if round == 0
                    && let Ok(samples) = samples
                {
                    samples.clear();
                }
            }
        }
        // Half a round is none: another one must fit.
        if round > 0 && Instant::now() + start.elapsed().mul_f64(0.7) > deadline {
            break;
        }
    }
    if let Some(progress) = &progress {
        progress.end();
    }
    results
}

/// How many steps that is at most.
pub fn steps(ways: usize) -> usize {
    (ROUNDS + 1) * LOADS.len() * ways
}

/// One measurement. What has failed once is not tried again: it may take seconds to fail.
fn one(load: Load, way: &Way, time: Duration, bytes: &mut u64, samples: &mut Samples) {
    let Ok(done) = samples else { return };
    match load.run(way, time, *bytes) {
        Err(error) => *samples = Err(format!("{error:#}")),
        Ok(sample) => {
            if let Load::Transfer(Direction::Up | Direction::Down) = load {
                let next = sample.rate * time.as_secs_f64();
                *bytes = (next as u64).clamp(BYTES.0, BYTES.1);
            }
            done.push(sample);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;
    use crate::bench::upstream::Upstream;

    #[test]
    fn what_fails_is_no_figure_and_holds_up_nobody_else() {
        let upstream = Upstream::start(Ipv4Addr::LOCALHOST.into()).unwrap();
        let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let ways = [upstream.address(), nobody].map(|address| Way::to(None, address, None));
        let results = measure(&ways, Instant::now(), None);
        assert_eq!(results.rounds(), 1);
        for row in &results.0 {
            assert!(row[0].as_ref().unwrap()[0].rate > 0.0, "{row:?}");
            let why = row[1].as_ref().unwrap_err();
            assert!(why.contains(&format!("connect to {nobody}: Connection refused")), "{why}");
        }
    }
}

//! How long requests took: a curve from the quickest to the slowest.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Points of the curve, sorted: a part of all requests, and the microseconds that they took at most.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency(Vec<(f64, f64)>);

/// What is kept of single requests: the tail in more detail than the rest, for that is what hurts.
pub const PARTS: [f64; 11] = [0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999];

impl Latency {
    /// Of single requests.
    pub fn of(mut took: Vec<Duration>) -> Self {
        took.sort_unstable();
        let last = took.len().saturating_sub(1);
        let at = |part: f64| took.get(((took.len() as f64 * part) as usize).min(last));
        let point = |part| Some((part, at(part)?.as_nanos() as f64 / 1e3));
        Self(PARTS.into_iter().filter_map(point).collect())
    }

    /// Of points that somebody else has counted out.
    pub fn from_points(mut points: Vec<(f64, f64)>) -> Self {
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        Self(points)
    }

    /// All that are known.
    pub fn points(&self) -> &[(f64, f64)] {
        &self.0
    }

    /// This part of the requests took at most so many microseconds; the next point that is known.
    pub fn at(&self, part: f64) -> Option<f64> {
        self.0.iter().find(|point| point.0 >= part).map(|point| point.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_in_a_hundred_is_slower_than_p99() {
        let latency = Latency::of((1..=1000).rev().map(Duration::from_micros).collect());
        assert_eq!(latency.at(0.5), Some(501.0));
        assert_eq!(latency.at(0.99), Some(991.0));
        assert_eq!(latency.at(0.999), Some(1000.0));
        assert_eq!(Latency::of(vec![Duration::from_micros(7)]).at(0.999), Some(7.0));
        assert_eq!(Latency::of(Vec::new()).at(0.5), None);
    }

    #[test]
    fn a_point_that_is_not_known_is_taken_from_the_slower_side() {
        let latency = Latency::from_points(vec![(0.99902, 9.0), (0.5, 1.0)]);
        assert_eq!((latency.at(0.5), latency.at(0.999)), (Some(1.0), Some(9.0)));
    }
}

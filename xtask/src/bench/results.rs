//! The results: every sample of a run, and what they come to.

use ambassador::bench::latency::{Latency, PARTS};
use ambassador::bench::summary::Summary;
use serde::{Deserialize, Serialize};

use super::catalogue::Load;
use super::load::Outcome;

/// One load, run once through one subject.
#[derive(Serialize, Deserialize)]
pub(crate) struct Sample {
    /// In which round, from 1 on.
    pub(crate) round: u16,
    /// What was done.
    pub(crate) load: Load,
    /// Through what.
    pub(crate) subject: String,
    /// What came out.
    pub(crate) end: End,
}

/// How a measurement ended.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum End {
    /// Every byte was right.
    Measured(Outcome),
    /// Why it did not, in a line.
    Failed(String),
}

/// All samples of a run.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Results(pub(crate) Vec<Sample>);

/// What became of one figure of one load through one subject.
pub(crate) enum Cell {
    /// There is nothing to measure, such as the memory of no proxy.
    Nothing,
    /// At least one of the samples failed.
    Failed,
    /// All went well.
    Measured(Summary),
}

impl Results {
    /// The figure of this name of a load through a subject.
    pub(crate) fn cell(&self, load: Load, subject: &str, figure: &str) -> Cell {
        let mut values = Vec::new();
        for sample in self.of(load, subject) {
            match &sample.end {
                End::Failed(_) => return Cell::Failed,
                End::Measured(outcome) => values.extend(outcome.figures.get(figure)),
            }
        }
        Summary::of(values).map_or(Cell::Nothing, Cell::Measured)
    }

    /// The median of a figure, if all went well.
    pub(crate) fn median(&self, load: Load, subject: &str, figure: &str) -> Option<f64> {
        match self.cell(load, subject, figure) {
            Cell::Measured(summary) => Some(summary.median),
            Cell::Nothing | Cell::Failed => None,
        }
    }

    /// Every failure, in a line of its own.
    pub(crate) fn failures(&self) -> Vec<String> {
        self.0
            .iter()
            .filter_map(|Sample { round, load, subject, end }| match end {
                End::Measured(_) => None,
                End::Failed(why) => {
                    Some(format!("{} through {subject}, round {round}: {why}", load.name))
                }
            })
            .collect()
    }

    /// How busy the upstream's CPU was during a load through a subject, as a median from 0 to 1.
    pub(crate) fn upstream_busy(&self, load: Load, subject: &str) -> Option<f64> {
        let busy = self.outcomes(load, subject).filter_map(|outcome| outcome.upstream_busy);
        Some(Summary::of(busy.collect())?.median)
    }

    /// How long requests took: the median of all rounds at each point.
    pub(crate) fn latency(&self, load: Load, subject: &str) -> Latency {
        let curves: Vec<_> =
            self.outcomes(load, subject).filter_map(|outcome| outcome.latency.as_ref()).collect();
        let point = |part: f64| {
            let values = curves.iter().filter_map(|curve| curve.at(part)).collect();
            Some((part, Summary::of(values)?.median))
        };
        Latency::from_points(PARTS.into_iter().filter_map(point).collect())
    }

    /// Whether anything was tried.
    pub(crate) fn has(&self, load: Load, subject: &str) -> bool {
        self.of(load, subject).next().is_some()
    }

    fn outcomes(&self, load: Load, subject: &str) -> impl Iterator<Item = &Outcome> {
        self.of(load, subject).filter_map(|sample| match &sample.end {
            End::Measured(outcome) => Some(outcome),
            End::Failed(_) => None,
        })
    }

    fn of(&self, load: Load, subject: &str) -> impl Iterator<Item = &Sample> {
        self.0.iter().filter(move |sample| sample.load == load && sample.subject == subject)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::catalogue::LOADS;

    fn sample(round: u16, load: Load, end: End) -> Sample {
        Sample { round, load, subject: "HAProxy".into(), end }
    }

    fn measured(figures: &[(&str, f64)], latency: Option<Latency>) -> End {
        let figures = figures.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
        End::Measured(Outcome { figures, upstream_busy: Some(0.5), latency })
    }

    #[test]
    fn one_failure_fails_the_figure() {
        let results = Results(vec![
            sample(1, LOADS[0], measured(&[("per second", 1.0)], None)),
            sample(2, LOADS[0], End::Failed("a reply has wrong bytes".into())),
        ]);
        assert!(matches!(results.cell(LOADS[0], "HAProxy", "per second"), Cell::Failed));
        assert_eq!(results.failures(), ["get through HAProxy, round 2: a reply has wrong bytes"]);
    }

    #[test]
    fn what_has_no_value_is_neither_measured_nor_failed() {
        let results = Results(vec![sample(1, LOADS[0], measured(&[("p50 µs", 3.0)], None))]);
        assert!(matches!(results.cell(LOADS[0], "HAProxy", "per second"), Cell::Nothing));
        assert_eq!(results.median(LOADS[0], "HAProxy", "p50 µs"), Some(3.0));
        assert!(matches!(results.cell(LOADS[1], "HAProxy", "p50 µs"), Cell::Nothing));
        assert!(results.has(LOADS[0], "HAProxy") && !results.has(LOADS[1], "HAProxy"));
    }

    #[test]
    fn what_is_written_can_be_read() {
        let curve = |slow| Some(Latency::from_points(vec![(0.5, 10.0), (0.999, slow)]));
        let results = Results(vec![
            sample(1, LOADS[0], measured(&[("per second", 1.0)], curve(20.0))),
            sample(2, LOADS[0], measured(&[("per second", 3.0)], curve(40.0))),
            sample(1, LOADS[1], measured(&[("per second", 2.0)], None)),
            sample(3, LOADS[0], End::Failed("no reply".into())),
        ]);
        let text = serde_json::to_string(&results).expect("write");
        let read: Results = serde_json::from_str(&text).expect("read");
        assert_eq!(read.failures(), results.failures());
        assert_eq!(read.median(LOADS[1], "HAProxy", "per second"), Some(2.0));
        let latency = read.latency(LOADS[0], "HAProxy");
        assert_eq!((latency.at(0.5), latency.at(0.999)), (Some(10.0), Some(30.0)));
    }
}

//! The results: every sample of a run, and what they come to.

use anyhow::Result;
use serde_json::{Value, json};

use super::load::{Load, Outcome};

/// One load, run once through one subject.
pub(crate) struct Sample {
    /// In which round, from 1 on.
    pub(crate) round: u16,
    /// What was done.
    pub(crate) load: Load,
    /// Through what.
    pub(crate) subject: String,
    /// What came out.
    pub(crate) outcome: Result<Outcome>,
}

/// The middle of some values, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    /// Half of the values are above, half below.
    pub(crate) median: f64,
    /// From the lowest to the highest, as a part of the median.
    pub(crate) spread: f64,
}

/// All samples of a run.
#[derive(Default)]
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
    /// The figure with this index of a load through a subject.
    pub(crate) fn cell(&self, load: Load, subject: &str, figure: usize) -> Cell {
        let mut values = Vec::new();
        for sample in self.of(load).filter(|sample| sample.subject == subject) {
            match &sample.outcome {
                Err(_) => return Cell::Failed,
                Ok(outcome) => values.extend(outcome.values[figure]),
            }
        }
        Summary::of(values).map_or(Cell::Nothing, Cell::Measured)
    }

    /// Every failure, in a line of its own.
    pub(crate) fn failures(&self) -> Vec<String> {
        self.0
            .iter()
            .filter_map(|sample| {
                let error = sample.outcome.as_ref().err()?;
                let (load, subject, round) = (sample.load.name(), &sample.subject, sample.round);
                Some(format!("{load} through {subject}, round {round}: {error:#}"))
            })
            .collect()
    }

    /// How busy the upstream's CPU was during a load through a subject, as a median from 0 to 1.
    pub(crate) fn upstream_busy(&self, load: Load, subject: &str) -> Option<f64> {
        let busy = self
            .of(load)
            .filter(|sample| sample.subject == subject)
            .filter_map(|sample| Some(sample.outcome.as_ref().ok()?.upstream_busy))
            .collect();
        Some(Summary::of(busy)?.median)
    }

    /// Every sample, for a program to read.
    pub(crate) fn to_json(&self) -> Value {
        self.0.iter().map(Sample::to_json).collect()
    }

    fn of(&self, load: Load) -> impl Iterator<Item = &Sample> {
        self.0.iter().filter(move |sample| sample.load == load)
    }
}

impl Sample {
    fn to_json(&self) -> Value {
        let mut sample = json!({
            "round": self.round,
            "load": self.load.name(),
            "subject": self.subject,
        });
        match &self.outcome {
            Err(error) => sample["failed"] = format!("{error:#}").into(),
            Ok(outcome) => {
                let names = self.load.figures().iter().map(|figure| figure.name.to_owned());
                let values = outcome.values.iter().map(|&value| Value::from(value));
                sample["figures"] = Value::Object(names.zip(values).collect());
                sample["upstream_busy"] = outcome.upstream_busy.into();
            }
        }
        sample
    }
}

impl Summary {
    /// None of no values.
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (lowest, highest) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        let spread = if median == 0.0 { 0.0 } else { (highest - lowest) / median };
        Some(Self { median, spread })
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    fn sample(round: u16, outcome: Result<Vec<Option<f64>>>) -> Sample {
        let outcome = outcome.map(|values| Outcome { values, upstream_busy: 0.5 });
        Sample { round, load: Load::Idle, subject: "HAProxy".into(), outcome }
    }

    #[test]
    fn the_median_is_in_the_middle_whatever_the_order() {
        let summary = |values: &[f64]| Summary::of(values.to_vec());
        assert_eq!(summary(&[3.0, 1.0, 2.0]), Some(Summary { median: 2.0, spread: 1.0 }));
        assert_eq!(summary(&[4.0, 1.0, 3.0, 2.0]).map(|summary| summary.median), Some(2.5));
        assert_eq!(summary(&[]), None);
    }

    #[test]
    fn one_failure_fails_the_figure() {
        let results = Results(vec![
            sample(1, Ok(vec![Some(1.0), Some(1.0)])),
            sample(2, Err(anyhow!("a reply has wrong bytes"))),
        ]);
        assert!(matches!(results.cell(Load::Idle, "HAProxy", 0), Cell::Failed));
        assert_eq!(results.failures(), ["idle through HAProxy, round 2: a reply has wrong bytes"]);
    }

    #[test]
    fn what_has_no_value_is_neither_measured_nor_failed() {
        let results = Results(vec![sample(1, Ok(vec![None, Some(3.0)]))]);
        assert!(matches!(results.cell(Load::Idle, "HAProxy", 0), Cell::Nothing));
        assert!(matches!(results.cell(Load::Idle, "HAProxy", 1), Cell::Measured(_)));
        assert!(matches!(results.cell(Load::Upload, "HAProxy", 0), Cell::Nothing));
    }
}

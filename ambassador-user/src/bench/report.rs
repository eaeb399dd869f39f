//! The report: the same facts as a table for people, and as JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::advice::{Advice, Subject};
use super::results::{LOADS, Load, Results, Sample, Samples};
use super::stage::{Missing, Way};
use super::table::{Table, short};
use crate::tier::WhyNot;

/// All that there is to tell.
#[derive(Debug, Serialize)]
pub struct Report {
    version: &'static str,
    kernel: String,
    rounds: usize,
    loads: Vec<Row>,
    #[serde(flatten)]
    circumstances: Circumstances,
    /// The route that was asked about; none for any plain one.
    route: Option<String>,
    /// What carries it here, and why no higher tier.
    tier: String,
    why_not: Vec<WhyNot>,
    advice: Advice,
    /// In the order of the table.
    #[serde(skip)]
    ways: Vec<String>,
}

/// What else is to be known of a run.
#[derive(Debug, Default, Serialize)]
pub struct Circumstances {
    /// Tiers that were not measured, and why.
    pub missing: Vec<Missing>,
    /// What an ambassador said of its trouble meanwhile.
    pub troubles: Vec<String>,
    /// How many of its CPUs, on average, worked for others.
    pub strangers: f64,
    #[serde(rename = "seconds", serialize_with = "in_seconds")]
    pub took: Duration,
}

/// One load.
#[derive(Debug, Serialize)]
struct Row {
    load: String,
    /// What there is in a second, and how much of it CPU time is told for.
    unit: &'static str,
    work: &'static str,
    ways: BTreeMap<String, Cell>,
}

/// One load on one way.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Cell {
    Failed { failed: String },
    Measured(Figures),
}

/// Medians of all rounds.
#[derive(Debug, Serialize)]
struct Figures {
    rate: f64,
    lowest: f64,
    highest: f64,
    /// Half of the requests took at most so many microseconds, and all but one in a hundred.
    p50_us: Option<f64>,
    p99_us: Option<f64>,
    /// Of a CPU, what the ambassador took for so much work.
    cpu_seconds: Option<f64>,
}

impl Report {
    /// Of what was measured on these ways, for this subject.
    pub fn new(
        ways: &[Way],
        results: &Results,
        subject: &Subject,
        circumstances: Circumstances,
    ) -> Self {
        let tiers: Vec<_> = ways.iter().map(|way| way.tier).collect();
        let advice = subject.advice(&tiers, results, circumstances.strangers);
        let ways: Vec<_> = ways.iter().map(Way::name).collect();
        let rows = LOADS.into_iter().zip(&results.0).map(|(load, row)| {
            let cells = row.iter().map(|samples| Cell::of(load, samples));
            let (unit, work) = (load.unit(), load.work());
            Row { load: load.noun(), unit, work, ways: ways.iter().cloned().zip(cells).collect() }
        });
        Self {
            version: env!("CARGO_PKG_VERSION"),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .map_or_else(|error| error.to_string(), |release| release.trim().to_owned()),
            rounds: results.rounds(),
            loads: rows.collect(),
            circumstances,
            route: subject.route.clone(),
            tier: subject.choice.tier.to_string(),
            why_not: subject.choice.why_not.clone(),
            advice,
            ways,
        }
    }

    /// Whether every byte of every load was right.
    pub fn verdict(&self) -> ExitCode {
        if self.failures().next().is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    fn failures(&self) -> impl Iterator<Item = String> {
        self.loads.iter().flat_map(|row| {
            row.ways.iter().filter_map(|(way, cell)| match cell {
                Cell::Failed { failed } => Some(format!("{} by {way}: {failed}", row.load)),
                Cell::Measured(_) => None,
            })
        })
    }

    /// A load has a row for its rate, one for how long requests took, and one for what that cost.
    fn table(&self) -> Table {
        let headings = std::iter::once(String::new()).chain(self.ways.iter().cloned());
        let mut table = Table::new(headings.collect());
        for row in &self.loads {
            let Row { load, unit, work, .. } = row;
            let reference = row.ways[&self.ways[0]].figures().map(|it| it.rate);
            let rate = |way: &String| match row.ways[way].figures() {
                None => "FAILED".to_owned(),
                Some(Figures { rate, .. }) => match reference {
                    Some(reference) if *way != self.ways[0] => {
                        format!("{} {:.2} ×", short(*rate), rate / reference)
                    }
                    _ => short(*rate),
                },
            };
            let took = |way: &String| {
                let figures = row.ways[way].figures();
                let took = figures.and_then(|it| it.p50_us.zip(it.p99_us));
                took.map_or_else(String::new, |(p50, p99)| {
                    format!("{}, {}", short(p50), short(p99))
                })
            };
            let cost = |way: &String| {
                let cost = row.ways[way].figures().and_then(|it| it.cpu_seconds);
                cost.map_or_else(String::new, short)
            };
            let lines: [(String, Vec<_>); 3] = [
                (format!("{load}: {unit}"), self.ways.iter().map(rate).collect()),
                ("  p50, p99 µs".to_owned(), self.ways.iter().map(took).collect()),
                (format!("  CPU of the proxy: {work}"), self.ways.iter().map(cost).collect()),
            ];
            for (name, cells) in lines {
                if cells.iter().any(|cell| !cell.is_empty()) {
                    table.row(std::iter::once(name).chain(cells).collect());
                }
            }
        }
        table
    }
}

impl Cell {
    fn of(load: Load, samples: &Samples) -> Self {
        let (unit, work) = load.scale();
        let samples = match samples {
            Ok(samples) => samples,
            Err(why) => return Self::Failed { failed: why.clone() },
        };
        let median = |figure: &dyn Fn(&Sample) -> Option<f64>| {
            Results::summary(samples, figure).map(|it| it.median)
        };
        let Some(rate) = Results::summary(samples, |it| Some(it.rate / unit)) else {
            return Self::Failed { failed: "it was never done".to_owned() };
        };
        Self::Measured(Figures {
            rate: rate.median,
            lowest: rate.lowest,
            highest: rate.highest,
            p50_us: median(&|it| Some(it.latency?[0])),
            p99_us: median(&|it| Some(it.latency?[1])),
            cpu_seconds: median(&|it| Some(it.cpu? * work)),
        })
    }

    fn figures(&self) -> Option<&Figures> {
        match self {
            Self::Failed { .. } => None,
            Self::Measured(figures) => Some(figures),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, kernel, rounds, circumstances, .. } = self;
        let Circumstances { missing, troubles, strangers, took } = circumstances;
        writeln!(
            f,
            "ambassador {version}, Linux {kernel}: {rounds} rounds in {:.1} s. Every byte was checked. Medians, \
             and × no proxy.\nOn the loopback: clients and proxies on one CPU, the server on another; others \
             kept {strangers:.2} of these busy.\n",
            took.as_secs_f64()
        )?;
        writeln!(f, "{}", self.table().render())?;
        for Missing { tier, reason } in missing {
            writeln!(f, "{tier} was not measured: {reason}")?;
        }
        self.failures().try_for_each(|failure| writeln!(f, "FAILED: {failure}"))?;
        troubles.iter().try_for_each(|trouble| writeln!(f, "the ambassador of {trouble}"))?;
        self.advice.comparisons.iter().try_for_each(|line| writeln!(f, "{line}"))?;
        writeln!(f, "Recommended: {}.", self.advice.recommendation)
    }
}

fn in_seconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Tier, TierLimit};
    use crate::tier::Choice;

    fn report(splice: Samples, circumstances: Circumstances) -> Report {
        let sample = |rate| Sample { rate, latency: Some([20.0, 40.0]), cpu: Some(1e-5) };
        let row = |splice| vec![Ok(vec![sample(2e4); 7]), splice, Ok(vec![sample(1e4); 7])];
        let mut results = Results(vec![row(Ok(vec![sample(1e4); 7])); LOADS.len()]);
        results.0[0] = row(splice);
        let way = |tier| Way::to(tier, ([127, 0, 0, 1], 1).into(), None);
        let ways = [None, Some(Tier::Splice), Some(Tier::Copy)].map(way);
        let choice = Choice { tier: Tier::Splice, relay: Tier::Splice, why_not: Vec::new() };
        let subject = Subject { route: None, choice, limit: TierLimit::Auto, required: None };
        Report::new(&ways, &results, &subject, circumstances)
    }

    fn good() -> Samples {
        Ok(vec![Sample { rate: 1e4, latency: None, cpu: None }; 7])
    }

    #[test]
    fn a_failure_is_no_figure_and_fails_the_whole() {
        let good = report(good(), Circumstances::default());
        assert_eq!(good.verdict(), ExitCode::SUCCESS);
        let failed = report(Err("a reply has wrong bytes".into()), Circumstances::default());
        assert_eq!(failed.verdict(), ExitCode::FAILURE);
        let text = failed.to_string();
        assert!(text.contains("FAILED | 10k 0.50 × |"), "{text}");
        let line = "FAILED: round trips on 1 connection by splice: a reply has wrong bytes";
        assert!(text.contains(line), "{text}");
        let json = serde_json::to_value(&failed).unwrap();
        assert_eq!(json["loads"][0]["ways"]["splice"]["failed"], "a reply has wrong bytes");
        assert_eq!(json["loads"][0]["ways"]["copy"]["rate"], 1e4);
    }
}

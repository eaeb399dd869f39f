//! The report of a run: tables with medians, spreads and ratios, and the results file.

use std::fs;
use std::path::Path;

use ambassador::bench::table::Table;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::catalogue::{LOADS, Load};
use super::gallery;
use super::load::Figure;
use super::machine::Machine;
use super::results::{Cell, Results};
use super::targets;

/// All that a run has to tell.
#[derive(Serialize, Deserialize)]
pub(crate) struct Report {
    /// The day on which it ended, as in 2026-01-31.
    pub(crate) date: String,
    /// Whether its rounds were shortened, and some of the loads left out.
    pub(crate) quick: bool,
    /// What it was measured on.
    pub(crate) machine: Machine,
    /// How it was measured, a sentence each.
    pub(crate) notes: Vec<String>,
    /// Whether other programs took so much of the CPUs that how busy they were says nothing.
    pub(crate) disturbed: bool,
    /// The loads, in the order of the run.
    pub(crate) loads: Vec<Load>,
    /// The names of the subjects, in the order of the run.
    pub(crate) subjects: Vec<String>,
    /// Every sample.
    pub(crate) results: Results,
}

/// What a program reads of a run.
const RESULTS: &str = "results.json";
/// What every subject is compared with.
const REFERENCES: [&str; 2] = ["no proxy", "HAProxy"];
/// From here on a server is taken to have been the limit.
const SATURATED: f64 = 0.95;

impl Report {
    /// The report for a reader.
    pub(crate) fn markdown(&self) -> String {
        let mut report = format!("# Benchmark\n\n- {}, {}\n", self.extent(), self.date);
        for line in self.machine.lines() {
            report += &format!("- {line}\n");
        }
        for note in self.notes.iter().chain(&self.saturated()) {
            report += &format!("- {note}\n");
        }
        report += "- Each figure is a median, with the distance from the lowest to the highest sample (±) \
                   and its ratio to no proxy and to HAProxy in the same run; ↑ more is better, ↓ less.\n";
        for &load in &self.loads {
            report += &format!("\n## {}\n\n{}", load.title, self.table(load).render());
        }
        if let Some(targets) = targets::table(self) {
            report += &format!("\n## Targets\n\n{}", targets.render());
        }
        let failures = self.results.failures();
        if !failures.is_empty() {
            report += "\n## Failed\n\n";
            for failure in failures {
                report += &format!("- {failure}\n");
            }
        }
        report
    }

    /// Writes the report and the results into a directory.
    pub(crate) fn write(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)
            .with_context(|| format!("create the directory {}", directory.display()))?;
        let json = serde_json::to_string_pretty(self).context("put results into JSON")?;
        let charts = gallery::charts(self);
        let mut report = self.markdown();
        for (name, _) in &charts {
            report += &format!("\n![{name}]({name}.svg)\n");
        }
        let texts = [(RESULTS.to_owned(), json + "\n"), ("report.md".into(), report)];
        let charts = charts.into_iter().map(|(name, chart)| (format!("{name}.svg"), chart));
        for (name, text) in texts.into_iter().chain(charts) {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }

    /// Reads what an earlier run wrote into a directory.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(RESULTS);
        let json = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_str(&json).with_context(|| format!("understand {}", path.display()))
    }

    /// How much of a run it was.
    pub(crate) fn extent(&self) -> String {
        let kind = if self.quick { "a quick run, with shortened rounds" } else { "a full run" };
        let rounds = self.results.0.iter().map(|sample| sample.round).max().unwrap_or(0);
        let s = if rounds == 1 { "" } else { "s" };
        let loads = match (self.loads.len(), LOADS.len()) {
            (some, all) if some < all => format!("{some} of the {all} loads"),
            _ => "all loads".into(),
        };
        format!("{kind}: {rounds} round{s} of {loads}")
    }

    /// What became of a figure through each subject that has it.
    pub(crate) fn measured(
        &self,
        load: Load,
        figure: &Figure,
    ) -> impl Iterator<Item = (&str, Cell)> {
        let subjects = self.subjects.iter();
        let cells = subjects
            .map(move |subject| (subject.as_str(), self.results.cell(load, subject, figure.name)));
        cells.filter(|(_, cell)| !matches!(cell, Cell::Nothing))
    }

    fn table(&self, load: Load) -> Table {
        let mut headings = vec![String::new()];
        for figure in load.figures() {
            headings.push(format!("{} {}", figure.name, figure.better));
            headings.push("× none, HAProxy".into());
        }
        let mut table = Table::new(headings);
        for subject in self.subjects.iter().filter(|subject| self.results.has(load, subject)) {
            let mut row = vec![subject.clone()];
            for figure in load.figures() {
                row.extend(self.cells(load, subject, figure));
            }
            table.row(row);
        }
        table
    }

    /// A figure, and how it compares.
    fn cells(&self, load: Load, subject: &str, figure: &Figure) -> [String; 2] {
        let summary = match self.results.cell(load, subject, figure.name) {
            Cell::Nothing => return [String::new(), String::new()],
            Cell::Failed => return ["FAILED".into(), String::new()],
            Cell::Measured(summary) => summary,
        };
        let ratios = REFERENCES.map(|name| match self.results.median(load, name, figure.name) {
            Some(reference) if reference > 0.0 => format!("{:.2}", summary.median / reference),
            _ => "–".into(),
        });
        let (decimals, median) = (figure.decimals, summary.median);
        [format!("{median:.decimals$} ±{:.0} %", summary.spread() * 100.0), ratios.join("  ")]
    }

    /// Where the server was the limit, so that the ways through look more alike than they are.
    fn saturated(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.disturbed {
            return notes;
        }
        for &load in &self.loads {
            let subjects: Vec<&str> = self
                .subjects
                .iter()
                .map(String::as_str)
                .filter(|subject| {
                    self.results.upstream_busy(load, subject).is_some_and(|busy| busy > SATURATED)
                })
                .collect();
            if !subjects.is_empty() {
                let (load, subjects) = (load.name, subjects.join(", "));
                notes.push(format!("The upstream's CPU was the limit of {load} with {subjects}"));
            }
        }
        notes
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::bench::load::Outcome;
    use crate::bench::results::{End, Sample};

    /// Of a run with these values of each load's first figure.
    pub(crate) fn report(values: &[(&str, &str, &[f64])]) -> Report {
        let mut results = Results::default();
        let mut report_loads = Vec::new();
        let mut subjects = Vec::new();
        for &(name, subject, values) in values {
            let load = *LOADS.iter().find(|load| load.name == name).expect("a load");
            if !report_loads.contains(&load) {
                report_loads.push(load);
            }
            if !subjects.contains(&subject.to_owned()) {
                subjects.push(subject.to_owned());
            }
            for (round, &value) in (1..).zip(values) {
                let figures = [(load.figures()[0].name.to_owned(), value)].into();
                let end = End::Measured(Outcome { figures, upstream_busy: None, latency: None });
                results.0.push(Sample { round, load, subject: subject.into(), end });
            }
        }
        let machine = Machine::look(&[]).expect("look at this machine");
        Report {
            date: "2026-01-31".into(),
            quick: false,
            machine,
            notes: Vec::new(),
            disturbed: false,
            loads: report_loads,
            subjects,
            results,
        }
    }

    #[test]
    fn what_a_run_has_written_can_be_read() {
        let directory = tempfile::tempdir().expect("create a directory");
        let written = report(&[("get", "no proxy", &[2.0]), ("get", "HAProxy", &[1.0])]);
        written.write(directory.path()).expect("write");
        let read = Report::read(directory.path()).expect("read");
        assert_eq!(read.markdown(), written.markdown());
        let text = read.markdown();
        assert!(text.contains("|       1 ±0 % |      0.50  1.00 |"), "{text}");
        assert!(directory.path().join("get.svg").is_file());
    }

    #[test]
    fn a_short_run_says_that_it_is_one() {
        let mut report = report(&[("get", "no proxy", &[2.0, 3.0])]);
        let all = LOADS.len();
        assert_eq!(report.extent(), format!("a full run: 2 rounds of 1 of the {all} loads"));
        report.quick = true;
        let told = "# Benchmark\n\n- a quick run, with shortened rounds: 2 rounds of 1 of the ";
        assert!(report.markdown().starts_with(told), "{}", report.markdown());
        assert!(report.markdown().contains(" loads, 2026-01-31\n"));
    }
}

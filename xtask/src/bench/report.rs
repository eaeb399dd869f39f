//! The report of a run: tables with medians, spreads and ratios, and the results file.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::catalogue::Load;
use super::load::Figure;
use super::machine::Machine;
use super::results::{Cell, Results};
use super::table::Table;

/// All that a run has to tell.
#[derive(Serialize, Deserialize)]
pub(crate) struct Report {
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

/// What every subject is compared with.
const REFERENCES: [&str; 2] = ["no proxy", "HAProxy"];
/// From here on a server is taken to have been the limit.
const SATURATED: f64 = 0.95;

impl Report {
    /// The report for a reader.
    pub(crate) fn markdown(&self) -> String {
        let mut report = String::from("# Benchmark\n\n");
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
        for (name, text) in [("results.json", json + "\n"), ("report.md", self.markdown())] {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
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

//! README's table of what it costs when a server fails, and to ask whether it does, which a run of these loads alone
//! may bring up to date.

use ambassador::bench::table::Table;

use super::super::catalogue::{Kind, Load};
use super::super::report::Report;
use super::super::results::Cell;

/// The figures that it has.
const SHOWN: [(&str, &str); 4] = [
    ("first success ms", "first success, ms"),
    ("all served ms", "all served, ms"),
    ("failed calls", "failed calls"),
    ("CPU of a core %", "CPU, % of a core"),
];

/// Whether a server fails in this load, or may.
pub(super) fn is_one(load: &Load) -> bool {
    matches!(load.kind, Kind::Failover { .. } | Kind::Checks)
}

/// The section, if the run has such loads.
pub(super) fn section(report: &Report) -> Option<String> {
    let loads: Vec<Load> = report.loads.iter().copied().filter(is_one).collect();
    let has_any = |subject: &&String| loads.iter().any(|&load| report.results.has(load, subject));
    let subjects: Vec<&String> = report.subjects.iter().filter(has_any).collect();
    if subjects.is_empty() {
        return None;
    }
    let mut headings = vec![String::new()];
    headings.extend(subjects.iter().map(|subject| subject.replace("ambassador ", "")));
    let mut table = Table::new(headings);
    for &load in &loads {
        for (name, label) in SHOWN {
            let Some(figure) = load.figures().iter().find(|it| it.name == name) else { continue };
            let cell = |subject: &&String| match report.results.cell(load, subject, name) {
                Cell::Nothing => String::new(),
                Cell::Failed => "FAILED".into(),
                Cell::Measured(it) => {
                    let shown = |it: f64| format!("{it:.*}", figure.decimals);
                    format!("{} ({}–{})", shown(it.median), shown(it.lowest), shown(it.highest))
                }
            };
            let mut row = vec![format!("{}: {label}", load.title)];
            row.extend(subjects.iter().map(cell));
            table.row(row);
        }
    }
    // Checks are apart by more than that takes, so that it is worth telling all the same.
    let disturbed = if report.disturbed { ", while other programs kept the CPUs busy" } else { "" };
    Some(format!(
        "From one interleaved run of {}, {}{disturbed}: medians, and the lowest and the highest of all \
         rounds.\n\n{}",
        report.date,
        report.extent(),
        table.render()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::report;

    #[test]
    fn there_is_a_column_for_each_that_fails_over() {
        let failing = report(&[
            ("get", "no proxy", &[1.0]),
            ("redis-killed", "ambassador direct", &[3.0, 5.0, 4.0]),
        ]);
        let told = section(&failing).expect("a section");
        assert!(told.contains("| Redis is killed: first success, ms | 4.0 (3.0–5.0) |"), "{told}");
        assert!(!told.contains("no proxy"));
        assert!(section(&report(&[("get", "no proxy", &[1.0])])).is_none());
    }
}

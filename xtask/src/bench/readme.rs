//! README's section about performance, made from a run, so that it says what was measured and nothing else.

mod failover;

use std::fs;

use ambassador::bench::table::{Table, short};
use anyhow::{Context, Result, ensure};

use super::catalogue::Load;
use super::gallery::{self, LATENCY};
use super::load::Figure;
use super::report::Report;
use super::results::Cell;
use super::targets;
use crate::workspace;

/// Between these lines of README everything is replaced.
const MARKS: Marks = Marks(
    "<!-- from `cargo xtask bench --report` -->",
    "<!-- end of what is from `cargo xtask bench --report` -->",
);
/// And between these by a run in which servers fail.
const OF_FAILOVER: Marks = Marks(
    "<!-- of failover, from `cargo xtask bench --report` -->",
    "<!-- end of what is of failover, from `cargo xtask bench --report` -->",
);
/// Where its charts are: they are in the repository because README shows them.
const CHARTS: &str = "xtask/charts";
/// The charts that it shows, of loads that a run has.
const SHOWN: [&str; 4] = ["get", LATENCY.1, "upload", "connections"];
/// Figures, by how their names begin, that are folded away, and what is said of them.
const DETAILS: [(&str, &str); 3] = [
    ("p99 µs", "Latency: all but one in a hundred took at most so many µs"),
    (
        "CPU s",
        "CPU of the machine, clients, servers and kernel included: seconds for 10,000 requests or a GB",
    ),
    ("proxy CPU s", "CPU of the proxy itself: seconds for 10,000 requests or a GB"),
];
/// The tiers, from the highest to the lowest.
const TIERS: [&str; 4] = ["direct", "sockmap", "splice", "copy"];
/// Fewer say nothing about the spread.
const ROUNDS: u16 = 3;
/// A difference below this may be chance.
const CHANCE: f64 = 0.03;

/// The lines around a part of README.
struct Marks(&'static str, &'static str);

/// Replaces what the run is about: the section with the charts that it shows, and what it tells of failover.
pub(crate) fn rewrite(report: &Report) -> Result<()> {
    ensure!(rounds(report) >= ROUNDS, "fewer than {ROUNDS} rounds: not to be published");
    let path = workspace::root().join("README.md");
    let mut readme = fs::read_to_string(&path).context("read README.md")?;
    if let Some(section) = failover::section(report) {
        readme = replaced(&readme, &OF_FAILOVER, &section)?;
    }
    if lasting(report).next().is_some() {
        ensure!(!report.disturbed, "the run was disturbed by other programs: not to be published");
        readme = replaced(&readme, &MARKS, &section(report, &put_charts(report)?))?;
    }
    fs::write(&path, readme).context("write README.md")
}

/// The loads in which no server fails.
fn lasting(report: &Report) -> impl Iterator<Item = Load> {
    report.loads.iter().copied().filter(|load| !failover::is_one(load))
}

/// Replaces the charts; returns the names of those there are.
fn put_charts(report: &Report) -> Result<Vec<&'static str>> {
    let root = workspace::root();
    let charts: Vec<_> =
        gallery::charts(report).into_iter().filter(|(name, _)| SHOWN.contains(name)).collect();
    let directory = root.join(CHARTS);
    if directory.exists() {
        fs::remove_dir_all(&directory).context("remove the charts of the run before")?;
    }
    fs::create_dir_all(&directory).with_context(|| format!("create {CHARTS}"))?;
    for (name, chart) in &charts {
        fs::write(directory.join(format!("{name}.svg")), chart)
            .with_context(|| format!("write {CHARTS}/{name}.svg"))?;
    }
    Ok(charts.into_iter().map(|(name, _)| name).collect())
}

/// The text with another section between its marks.
fn replaced(readme: &str, Marks(begin, end): &Marks, section: &str) -> Result<String> {
    let (before, rest) =
        readme.split_once(begin).with_context(|| format!("find {begin} in README.md"))?;
    let (_, after) = rest.split_once(end).with_context(|| format!("find {end} in README.md"))?;
    Ok(format!("{before}{begin}\n{section}{end}{after}"))
}

fn section(report: &Report, charts: &[&str]) -> String {
    let mut section = format!(
        "One interleaved run of `cargo xtask bench`, of {}: {}.\nFigures are medians. Clients and \
         proxy have one CPU, the server has the other, a veth pair between them. Measured on:\n\n",
        report.date,
        report.extent()
    );
    for line in report.machine.lines() {
        section += &format!("- {line}\n");
    }
    section += "\n";
    for name in SHOWN.iter().filter(|name| charts.contains(name)) {
        section += &format!("![{name}]({CHARTS}/{name}.svg)\n\n");
    }
    let title =
        |load: Load, figure: &Figure| format!("{}: {} {}", load.title, figure.name, figure.better);
    section += &overview(report, |load| load.figures().first(), title).render();
    section += "\n**Where a tier does not pay**, by the first figure of each load:\n\n";
    for line in shortfalls(report) {
        section += &format!("- {line}\n");
    }
    for (figure, summary) in DETAILS {
        let of = |load: Load| load.figures().iter().find(|known| known.name.starts_with(figure));
        section += &folded(summary, &overview(report, of, |load, _| load.name.into()));
    }
    if let Some(targets) = targets::table(report) {
        section += &folded("What was set out to be reached", &targets);
    }
    let failures = report.results.failures();
    if !failures.is_empty() {
        section += "\n**Failed:**\n\n";
        section.extend(failures.iter().map(|failure| format!("- {failure}\n")));
    }
    section
}

fn rounds(report: &Report) -> u16 {
    report.results.0.iter().map(|sample| sample.round).max().unwrap_or(0)
}

/// What is there for those who unfold it.
fn folded(summary: &str, table: &Table) -> String {
    format!("\n<details><summary>{summary}</summary>\n\n{}\n</details>\n", table.render())
}

/// One figure of every load that has it through every subject. Those that carry few loads share a
/// column.
fn overview(
    report: &Report,
    figure: impl Fn(Load) -> Option<&'static Figure>,
    label: impl Fn(Load, &Figure) -> String,
) -> Table {
    let carried = |subject: &&String| {
        lasting(report).filter(|&load| report.results.has(load, subject)).count()
    };
    let loads = lasting(report).count();
    let (general, special): (Vec<&String>, Vec<_>) =
        report.subjects.iter().partition(|subject| carried(subject) * 2 > loads);
    let mut headings = vec![String::new()];
    headings.extend(general.iter().map(|subject| subject.replace("ambassador ", "")));
    headings.push("others".into());
    let mut table = Table::new(headings);
    for load in lasting(report) {
        let Some(figure) = figure(load) else { continue };
        let cell = |subject: &str| match report.results.cell(load, subject, figure.name) {
            Cell::Nothing => String::new(),
            Cell::Failed => "FAILED".into(),
            Cell::Measured(summary) => short(summary.median),
        };
        let mut row = vec![label(load, figure)];
        row.extend(general.iter().map(|subject| cell(subject)));
        let others = special.iter().filter(|subject| report.results.has(load, subject));
        let others: Vec<_> = others.map(|subject| format!("{subject} {}", cell(subject))).collect();
        row.push(others.join(", "));
        table.row(row);
    }
    table
}

/// Where each tier is behind what one would take instead: HAProxy, or a tier that needs less.
fn shortfalls(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    for (number, tier) in TIERS.iter().enumerate() {
        let subject = format!("ambassador {tier}");
        if !report.subjects.contains(&subject) {
            continue;
        }
        let lower =
            TIERS[number + 1..].iter().filter(|&&lower| lower != "copy" || *tier == "splice");
        let others = lower.map(|lower| (format!("ambassador {lower}"), format!("`{lower}`")));
        for (other, name) in others.chain([("HAProxy".into(), "HAProxy".into())]) {
            let behind = behind(report, &subject, &other);
            lines.push(if behind.is_empty() {
                let chance = CHANCE * 100.0;
                format!("In no load is `{tier}` worse than {name} by more than {chance:.0} %")
            } else {
                format!("`{tier}` is behind {name} in {}", behind.join(", "))
            });
        }
    }
    lines
}

/// The loads in which one subject is worse than the other by more than chance, and how much.
fn behind(report: &Report, subject: &str, other: &str) -> Vec<String> {
    let ratio = |figure: &Figure, load| -> Option<f64> {
        let value = report.results.median(load, subject, figure.name)?;
        let other = report.results.median(load, other, figure.name)?;
        (other > 0.0).then(|| value / other)
    };
    let worse = |load: &Load| {
        let figure = &load.figures()[0];
        ratio(figure, *load).is_some_and(|ratio| match figure.better {
            '↑' => ratio < 1.0 - CHANCE,
            _ => ratio > 1.0 + CHANCE,
        })
    };
    lasting(report)
        .filter(worse)
        .filter_map(|load| {
            Some(format!("{} ({:.2} ×)", load.name, ratio(&load.figures()[0], load)?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::report;

    #[test]
    fn only_what_is_between_the_marks_is_replaced() {
        let Marks(begin, end) = MARKS;
        let readme = format!("# x\n{begin}\nold\n{end}\nrest\n");
        let new = replaced(&readme, &MARKS, "new\n").expect("both marks");
        assert_eq!(new, format!("# x\n{begin}\nnew\n{end}\nrest\n"));
        assert_eq!(replaced(&new, &MARKS, "new\n").expect("both marks"), new);
        assert!(replaced(&new, &OF_FAILOVER, "new\n").is_err());
    }

    #[test]
    fn the_readme_has_the_marks() {
        let readme =
            fs::read_to_string(workspace::root().join("README.md")).expect("read README.md");
        assert!([MARKS, OF_FAILOVER].iter().all(|marks| replaced(&readme, marks, "").is_ok()));
    }

    #[test]
    fn it_is_told_where_a_tier_does_not_pay() {
        let report = report(&[
            ("get", "ambassador sockmap", &[76.0]),
            ("get", "ambassador splice", &[105.0]),
            ("get", "HAProxy", &[100.0]),
            // More is worse here.
            ("start", "ambassador sockmap", &[70.0]),
            ("start", "HAProxy", &[35.0]),
        ]);
        let told = shortfalls(&report);
        assert_eq!(told[0], "`sockmap` is behind `splice` in get (0.72 ×)");
        assert_eq!(told[1], "`sockmap` is behind HAProxy in get (0.76 ×), start (2.00 ×)");
        assert!(
            told.contains(&"In no load is `splice` worse than HAProxy by more than 3 %".to_owned())
        );
        let section = section(&report, &["get"]);
        assert!(section.contains("xtask/charts/get.svg") && !section.contains("upload.svg"));
        assert!(
            section.starts_with(
                "One interleaved run of `cargo xtask bench`, of 2026-01-31: a full run"
            )
        );
        assert_eq!(section.matches("<details>").count(), section.matches("</details>").count());
    }
}

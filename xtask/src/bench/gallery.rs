//! The charts of a run: a bar chart of each load, and how long requests took where that says most.

use ambassador::bench::table::short;

use super::chart::bars::{self, Bar};
use super::chart::curves;
use super::report::Report;

/// The load whose latency is drawn from the middle to the tail, and what that chart is called.
pub(crate) const LATENCY: (&str, &str) = ("round-trips-64", "latency");
/// What bars are compared with.
const REFERENCE: &str = "HAProxy";

/// Every chart, by the name of its file without the ending.
pub(crate) fn charts(report: &Report) -> Vec<(&'static str, String)> {
    let bars = report.loads.iter().filter_map(|&load| {
        let figure = &load.figures()[0];
        let reference = report.results.median(load, REFERENCE, figure.name);
        let remark = |subject: &str| -> Option<String> {
            let value = report.results.median(load, subject, figure.name)?;
            let reference = reference.filter(|&value| value > 0.0 && subject != REFERENCE)?;
            Some(format!("{} × {REFERENCE}", short(value / reference)))
        };
        let bars: Vec<_> = report
            .measured(load, figure)
            .map(|(subject, cell)| Bar {
                subject,
                cell,
                remark: remark(subject).unwrap_or_default(),
            })
            .collect();
        let better = if figure.better == '↑' { "more" } else { "less" };
        let subtitle = format!(
            "{}; {better} is better; lines go from the lowest to the highest sample",
            figure.name
        );
        (!bars.is_empty()).then(|| (load.name, bars::draw(load.title, &subtitle, &bars)))
    });
    bars.chain(latency(report)).collect()
}

fn latency(report: &Report) -> Option<(&'static str, String)> {
    let (name, chart) = LATENCY;
    let load = *report.loads.iter().find(|load| load.name == name)?;
    let of = |subject: &String| report.results.latency(load, subject);
    let curves: Vec<_> =
        report.subjects.iter().map(|subject| (subject.as_str(), of(subject))).collect();
    let subtitle = "µs that so many of the requests took at most; less is better";
    Some((chart, curves::draw(&format!("Latency: {}", load.title), subtitle, &curves)))
}

//! Bars, one under the other: a figure of one load, through each subject.

use ambassador::bench::table::short;

use super::{TOP, WIDTH, framed, line, side, text};
use crate::bench::results::Cell;

/// One subject.
pub(crate) struct Bar<'a> {
    /// Its name.
    pub(crate) subject: &'a str,
    /// What was measured.
    pub(crate) cell: Cell,
    /// How that compares, in words.
    pub(crate) remark: String,
}

const ROW: f64 = 26.0;
const THICK: f64 = 16.0;
/// Where bars begin and where the longest ends: names before, numbers after.
const LEFT: f64 = 170.0;
const RIGHT: f64 = WIDTH - 190.0;
/// A bar that is longer than so many times the middle one is cut, so that the others can be told apart.
const LONG: f64 = 4.0;

/// The chart. A line in each bar goes from the lowest to the highest sample.
pub(crate) fn draw(title: &str, subtitle: &str, bars: &[Bar<'_>]) -> String {
    let scale = (RIGHT - LEFT) / longest(bars);
    let mut drawing = String::new();
    for (number, Bar { subject, cell, remark }) in bars.iter().enumerate() {
        let top = TOP + ROW * number as f64;
        let baseline = top + THICK / 2.0 + 4.5;
        drawing += &text("end", LEFT - 10.0, baseline, subject);
        match cell {
            Cell::Nothing => {}
            Cell::Failed => drawing += &text("bad", LEFT + 8.0, baseline, "FAILED"),
            Cell::Measured(summary) => {
                let at = |value: f64| LEFT + (value * scale).min(RIGHT - LEFT);
                let end = at(summary.median);
                drawing += &format!(
                    "<rect class=\"{}\" x=\"{LEFT}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{THICK}\" \
                     rx=\"2\"/>\n",
                    side(subject),
                    (end - LEFT).max(1.0)
                );
                let middle = top + THICK / 2.0;
                let (low, high) = (at(summary.lowest), at(summary.highest));
                if high - low > 1.0 {
                    drawing += &line("w", (low, middle), (high, middle));
                }
                let cut = if summary.median * scale > RIGHT - LEFT { "→ " } else { "" };
                let words = format!("{cut}{}", short(summary.median));
                let after = end.max(high) + 8.0;
                drawing += &text("", after, baseline, &words);
                drawing += &text("s end", WIDTH - 8.0, baseline, remark);
            }
        }
    }
    framed(TOP + ROW * bars.len() as f64 + 4.0, title, subtitle, &drawing)
}

/// The value of the longest bar.
fn longest(bars: &[Bar<'_>]) -> f64 {
    let summary = |bar: &Bar<'_>| match bar.cell {
        Cell::Measured(summary) => Some(summary),
        Cell::Nothing | Cell::Failed => None,
    };
    let mut medians: Vec<f64> = bars.iter().filter_map(summary).map(|it| it.median).collect();
    medians.sort_by(f64::total_cmp);
    let middle = medians.get(medians.len() / 2).copied().unwrap_or(1.0);
    let highest = bars.iter().filter_map(summary).map(|it| it.highest).fold(0.0, f64::max);
    highest.min(middle * LONG).max(f64::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambassador::bench::summary::Summary;

    fn bar(subject: &str, median: f64) -> Bar<'_> {
        let cell = Cell::Measured(Summary { median, lowest: median, highest: median });
        Bar { subject, cell, remark: String::new() }
    }

    fn widths(chart: &str) -> Vec<f64> {
        let width = |rest: &str| rest.split('"').next()?.parse().ok();
        let bars = chart.lines().filter(|line| line.starts_with("<rect"));
        bars.filter_map(|bar| width(bar.split_once("width=\"")?.1)).collect()
    }

    #[test]
    fn bars_are_as_long_as_what_they_stand_for() {
        let chart = draw("t", "s", &[bar("no proxy", 100.0), bar("HAProxy", 50.0)]);
        assert_eq!(widths(&chart), [RIGHT - LEFT, (RIGHT - LEFT) / 2.0]);
    }

    #[test]
    fn one_that_is_far_off_is_cut_and_says_so() {
        let chart = draw("t", "s", &[bar("a", 1.0), bar("b", 1.0), bar("socat", 900.0)]);
        assert_eq!(widths(&chart), [1.0, 1.0, LONG].map(|it| it * (RIGHT - LEFT) / LONG));
        assert!(chart.contains("→ 900<"));
    }

    #[test]
    fn a_failure_is_no_short_bar() {
        let failed = Bar { subject: "HAProxy", cell: Cell::Failed, remark: String::new() };
        let chart = draw("t", "s", &[bar("no proxy", 1.0), failed]);
        assert_eq!((widths(&chart).len(), chart.matches("FAILED").count()), (1, 1));
    }
}

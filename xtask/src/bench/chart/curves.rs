//! Latency from the middle to the tail: a curve for each subject, both axes logarithmic.

use ambassador::bench::latency::Latency;
use ambassador::bench::table::short;

use super::{TOP, WIDTH, framed, line, side, text};

const HEIGHT: f64 = 400.0;
const LEFT: f64 = 60.0;
/// Names stand behind the ends of the curves.
const RIGHT: f64 = WIDTH - 170.0;
const BOTTOM: f64 = HEIGHT - 40.0;
/// Names need so much room.
const LINE: f64 = 17.0;
/// The parts of all requests between which it is drawn, with a line at each.
const PARTS: [f64; 4] = [0.5, 0.9, 0.99, 0.999];

/// Strokes that can be told apart on a light and on a dark page; blues and greens are ours.
const OURS: [&str; 4] = ["#1f7ae0", "#12a594", "#7c6cf0", "#3fb950"];
const OTHERS: [&str; 6] = ["#e5822f", "#d6409f", "#b08a2e", "#e5484d", "#8f6f5a", "#ab6fd1"];

/// The chart of these subjects.
pub(crate) fn draw(title: &str, subtitle: &str, curves: &[(&str, Latency)]) -> String {
    let curves: Vec<Curve<'_>> =
        curves.iter().filter_map(|(subject, latency)| Curve::of(subject, latency)).collect();
    let values = || curves.iter().flat_map(|curve| &curve.points).map(|point| point.1);
    let lowest = values().fold(f64::MAX, f64::min).max(0.1);
    let highest = values().fold(lowest * 1.1, f64::max);
    let y = |value: f64| {
        let share = (value / lowest).log10() / (highest / lowest).log10();
        BOTTOM - share * (BOTTOM - TOP)
    };

    let mut drawing = String::new();
    for value in round_values(lowest, highest) {
        drawing += &line("l", (LEFT, y(value)), (RIGHT, y(value)));
        drawing += &text("s end", LEFT - 8.0, y(value) + 4.5, &short(value));
    }
    for part in PARTS {
        drawing += &line("l", (x(part), TOP), (x(part), BOTTOM));
        let name = format!("p{}", (part * 1000.0).round() / 10.0);
        drawing += &text("s mid", x(part), BOTTOM + 20.0, &name);
    }
    let (mut ours, mut others) = (OURS.iter().cycle(), OTHERS.iter().cycle());
    let mut names = Vec::new();
    for Curve { subject, points } in &curves {
        let colour = match side(subject) {
            "none" => &"#8c959f",
            "ours" => ours.next().expect("a cycle has no end"),
            _ => others.next().expect("a cycle has no end"),
        };
        let path: Vec<String> =
            points.iter().map(|&(part, value)| format!("{:.1},{:.1}", x(part), y(value))).collect();
        drawing += &format!(
            "<polyline class=\"{}\" style=\"stroke:{colour}\" points=\"{}\"/>\n",
            if side(subject) == "none" { "c dashed" } else { "c" },
            path.join(" ")
        );
        names.extend(points.last().map(|&(_, value)| (y(value), *subject, colour)));
    }
    names.sort_by(|one, other| one.0.total_cmp(&other.0));
    for ((end, subject, colour), place) in names.iter().zip(apart(&names)) {
        drawing += &format!(
            "<polyline class=\"c\" style=\"stroke:{colour};stroke-width:1\" points=\"{:.1},{end:.1} {:.1},{place:.1}\"/>\n",
            RIGHT + 2.0,
            RIGHT + 16.0
        );
        drawing += &text("", RIGHT + 20.0, place + 4.5, subject);
    }
    framed(HEIGHT, title, subtitle, &drawing)
}

struct Curve<'a> {
    subject: &'a str,
    points: Vec<(f64, f64)>,
}

impl<'a> Curve<'a> {
    /// None where nothing is known of it.
    fn of(subject: &'a str, latency: &Latency) -> Option<Self> {
        let shown = |point: &&(f64, f64)| (PARTS[0]..=PARTS[3]).contains(&point.0);
        let points: Vec<_> = latency.points().iter().filter(shown).copied().collect();
        (points.len() > 1).then_some(Self { subject, points })
    }
}

/// Each further nine is as far as the one before.
fn x(part: f64) -> f64 {
    let nines = |part: f64| -(1.0 - part).log10();
    let share = (nines(part) - nines(PARTS[0])) / (nines(PARTS[3]) - nines(PARTS[0]));
    LEFT + share * (RIGHT - LEFT)
}

/// 1, 2 and 5 of each power of ten in between.
fn round_values(lowest: f64, highest: f64) -> Vec<f64> {
    let powers = (lowest.log10().floor() as i32)..=(highest.log10().ceil() as i32);
    powers
        .flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10_f64.powi(power)))
        .filter(|value| (lowest..=highest).contains(value))
        .collect()
}

/// Heights for names that want to be at these, from the top down: near, but readable.
fn apart<T, U>(names: &[(f64, T, U)]) -> Vec<f64> {
    let mut free = f64::MIN;
    let mut places: Vec<f64> = Vec::with_capacity(names.len());
    for (wanted, ..) in names {
        places.push(wanted.max(free));
        free = wanted.max(free) + LINE;
    }
    // What went below the edge moves up, and pushes those above it.
    let mut free = BOTTOM;
    for place in places.iter_mut().rev() {
        *place = place.min(free);
        free = *place - LINE;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_nine_is_as_far_as_the_one_before() {
        assert_eq!((x(0.5), x(0.999).round()), (LEFT, RIGHT));
        assert!((x(0.99) - x(0.9) - (x(0.999) - x(0.99))).abs() < 0.001);
    }

    #[test]
    fn names_do_not_cover_each_other_or_leave_the_chart() {
        let places = apart(&[(100.0, "", ""), (101.0, "", ""), (BOTTOM, "", ""), (BOTTOM, "", "")]);
        assert!(places.windows(2).all(|pair| pair[1] - pair[0] >= LINE));
        assert!(places.iter().all(|&place| place <= BOTTOM));
        assert_eq!(places[0], 100.0);
    }

    #[test]
    fn a_subject_of_which_nothing_is_known_has_no_curve() {
        let known = Latency::from_points(vec![(0.5, 10.0), (0.9, 20.0), (0.999, 200.0)]);
        let chart = draw("t", "s", &[("HAProxy", known), ("socat", Latency::default())]);
        assert!(chart.contains("HAProxy") && !chart.contains("socat") && !chart.contains("NaN"));
    }
}

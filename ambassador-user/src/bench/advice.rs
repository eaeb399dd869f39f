//! What the figures mean for a route: which tier carries it, what the others would do, what to change.
//!
//! A difference that is within the spread is said to be none.

use std::fmt;

use serde::Serialize;

use super::results::{Difference, ENOUGH, LOADS, Results};
use crate::config::{Tier, TierLimit};
use crate::tier::{Choice, WhyNot};

/// With more than this many CPUs taken by others the figures tell of those.
const DISTURBED: f64 = 0.5;

/// What is asked about.
#[derive(Debug)]
pub struct Subject {
    /// The route's name; none for any plain route.
    pub route: Option<String>,
    /// What carries it here.
    pub choice: Choice,
    /// The highest tier that its configuration allows.
    pub limit: TierLimit,
    /// The lowest.
    pub required: Option<Tier>,
}

/// What there is to say: the comparisons, and what follows from them.
#[derive(Debug, PartialEq, Serialize)]
pub struct Advice {
    pub comparisons: Vec<String>,
    pub recommendation: String,
}

/// One tier against another.
#[derive(Default)]
struct Against {
    /// In what it does more, and how many times as much.
    more: Vec<(String, f64)>,
    less: Vec<(String, f64)>,
    alike: Vec<String>,
    unknown: Vec<String>,
}

impl Subject {
    /// By what was measured on these ways, each a tier or none, while others had so many CPUs.
    pub fn advice(&self, ways: &[Option<Tier>], results: &Results, others: f64) -> Advice {
        let tier = self.choice.tier;
        let mut comparisons = vec![format!("{} is carried by {tier} here.", self.who())];
        if let Some(required) = self.required.filter(|required| *required > tier) {
            comparisons.push(format!(
                "{required} is required: the ambassador does not start here (exit 77)."
            ));
        }
        if others > DISTURBED {
            let recommendation = format!(
                "none, because other programs kept {others:.1} of the CPUs busy; repeat it when they are \
                 quieter"
            );
            return Advice { comparisons, recommendation };
        }
        let place = |tier: Tier| ways.iter().position(|way| *way == Some(tier));
        let Some(own) = place(tier) else {
            let recommendation = format!("none, because {tier} could not be measured");
            return Advice { comparisons, recommendation };
        };
        let mut changes = Vec::new();
        for higher in ways.iter().flatten().copied().filter(|it| *it > tier) {
            let against = Against::of(results, place(higher).unwrap_or(own), own);
            let why = self.why_not(higher);
            comparisons
                .push(format!("{higher}, against {tier}: {against}. It is not used: {why}."));
            changes.extend(self.rise(higher, why, &against));
        }
        let lower = ways.iter().flatten().copied().filter(|it| *it < tier);
        for (steps, lower) in lower.enumerate() {
            let against = Against::of(results, own, place(lower).unwrap_or(own));
            // What this tier is good for, the next one tells.
            if steps == 0 || !against.less.is_empty() {
                comparisons.push(format!("{tier}, against {lower}: {against}."));
            }
            changes.extend(fall(tier, lower, &against));
        }
        let recommendation = if results.rounds() < ENOUGH {
            format!("none after fewer than {ENOUGH} rounds; give it more with --time")
        } else if changes.is_empty() {
            "leave it as it is".to_owned()
        } else {
            changes.join("; ")
        };
        Advice { comparisons, recommendation }
    }

    fn who(&self) -> String {
        self.route.as_ref().map_or("A plain route".to_owned(), |route| format!("Route {route}"))
    }

    fn why_not(&self, tier: Tier) -> &str {
        let name = tier.to_string();
        let why = self.choice.why_not.iter().find(|WhyNot { tier, .. }| *tier == name);
        why.map_or("a higher one is", |why| &why.reason)
    }

    /// Whether to have it carried by a higher tier, and what that takes.
    fn rise(&self, tier: Tier, why: &str, against: &Against) -> Option<String> {
        if against.more.is_empty() {
            return None;
        }
        let change = if self.limit.allows(tier) {
            format!("have it carried by {tier} if you can change what keeps it from that ({why})")
        } else {
            format!("allow it {tier} (`tier: {tier}`, or `auto`)")
        };
        Some(if against.less.is_empty() {
            change
        } else {
            format!("{change}, if clients mostly do {}", nouns(&against.more))
        })
    }
}

/// Whether to have it carried by a lower tier.
fn fall(tier: Tier, lower: Tier, against: &Against) -> Option<String> {
    if against.less.is_empty() {
        return None;
    }
    Some(if against.more.is_empty() {
        format!("keep it to {lower} (`tier: {lower}`), because {tier} does not pay here")
    } else {
        format!(
            "keep it to {lower} (`tier: {lower}`) if clients mostly do {}, for which {tier} does not pay",
            nouns(&against.less)
        )
    })
}

impl Against {
    fn of(results: &Results, way: usize, other: usize) -> Self {
        let mut against = Self::default();
        for (row, load) in LOADS.into_iter().enumerate() {
            match results.difference(row, way, other) {
                Difference::Unknown => against.unknown.push(load.noun()),
                Difference::None => against.alike.push(load.noun()),
                Difference::Times(ratio) if ratio > 1.0 => against.more.push((load.noun(), ratio)),
                Difference::Times(ratio) => against.less.push((load.noun(), ratio)),
            }
        }
        against
    }
}

impl fmt::Display for Against {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times = self.more.iter().chain(&self.less);
        let mut parts: Vec<_> = times.map(|(it, ratio)| format!("{ratio:.2} × the {it}")).collect();
        if !self.alike.is_empty() {
            parts.push(format!("no difference beyond the spread in {}", self.alike.join(", ")));
        }
        if !self.unknown.is_empty() {
            parts.push(format!("not known in {}", self.unknown.join(", ")));
        }
        f.write_str(&parts.join("; "))
    }
}

fn nouns(loads: &[(String, f64)]) -> String {
    loads.iter().map(|(noun, _)| noun.as_str()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::Sample;

    const WAYS: [Option<Tier>; 4] =
        [None, Some(Tier::Direct), Some(Tier::Splice), Some(Tier::Copy)];

    /// The rates of `direct`, `splice` and `copy` in each load, a little apart in each round.
    fn results(rates: [[f64; 3]; 5], rounds: u32) -> Results {
        let samples = |rate: f64| {
            let round = |round| Sample {
                rate: rate * (1.0 + f64::from(round) * 0.1),
                latency: None,
                cpu: None,
            };
            Ok((0..rounds).map(round).collect())
        };
        let row = |[direct, splice, copy]: [f64; 3]| {
            [2.0, direct, splice, copy].into_iter().map(samples).collect()
        };
        Results(rates.into_iter().map(row).collect())
    }

    fn kept_to(tier: Tier, limit: TierLimit, reason: &str) -> Subject {
        let why = |tier: Tier| WhyNot { tier: tier.to_string(), reason: reason.to_owned() };
        let why_not = [Tier::Direct, Tier::Sockmap].map(why).into();
        let choice = Choice { tier, relay: tier, why_not };
        Subject { route: Some("orders-db".into()), choice, limit, required: None }
    }

    #[test]
    fn a_higher_tier_that_pays_is_recommended_with_what_it_takes() {
        let results = results([[1.9, 1.0, 1.0]; 5], 7);
        let limit = TierLimit::AtMost(Tier::Splice);
        let subject = kept_to(Tier::Splice, limit, "not allowed (tier: splice)");
        let advice = subject.advice(&WAYS, &results, 0.2);
        assert_eq!(advice.comparisons[0], "Route orders-db is carried by splice here.");
        let gain = &advice.comparisons[1];
        assert!(
            gain.starts_with("direct, against splice: 1.90 × the round trips on 1 connection; "),
            "{gain}"
        );
        assert!(gain.ends_with("It is not used: not allowed (tier: splice)."), "{gain}");
        assert_eq!(advice.recommendation, "allow it direct (`tier: direct`, or `auto`)");
        let subject = kept_to(Tier::Splice, TierLimit::Auto, "idle_timeout");
        assert_eq!(
            subject.advice(&WAYS, &results, 0.2).recommendation,
            "have it carried by direct if you can change what keeps it from that (idle_timeout)"
        );
    }

    #[test]
    fn what_is_within_the_spread_is_no_difference() {
        let mut results = results([[1.2, 1.0, 1.0]; 5], 7);
        // In one of the rounds it was the other way round.
        for row in &mut results.0 {
            row[1].as_mut().unwrap()[3].rate = 1.0;
        }
        let advice = kept_to(Tier::Splice, TierLimit::Auto, "x").advice(&WAYS, &results, 0.2);
        assert!(advice.comparisons[1].contains(": no difference beyond the spread in round"));
        assert_eq!(advice.recommendation, "leave it as it is");
    }

    #[test]
    fn a_tier_that_does_not_pay_is_said_not_to() {
        let subject = kept_to(Tier::Splice, TierLimit::Auto, "x");
        let worse = results([[1.0, 1.0, 1.3]; 5], 7);
        assert_eq!(
            subject.advice(&WAYS, &worse, 0.2).recommendation,
            "keep it to copy (`tier: copy`), because splice does not pay here"
        );
        let mut rates = [[1.0, 1.0, 0.5]; 5];
        rates[0][2] = 1.2;
        let mixed = subject.advice(&WAYS, &results(rates, 7), 0.2);
        assert_eq!(
            mixed.recommendation,
            "keep it to copy (`tier: copy`) if clients mostly do round trips on 1 connection, for which \
             splice does not pay"
        );
        assert!(mixed.comparisons[2].ends_with("; 0.83 × the round trips on 1 connection."));
    }

    #[test]
    fn what_failed_and_what_was_seldom_measured_is_not_known() {
        let subject = kept_to(Tier::Splice, TierLimit::Auto, "x");
        let advice = subject.advice(&WAYS, &results([[1.9, 1.0, 1.0]; 5], 4), 0.2);
        assert!(advice.comparisons[1].contains("not known in round trips on 1 connection"));
        assert!(advice.recommendation.starts_with("none after fewer than 5 rounds"));
        let mut failed = results([[1.9, 1.0, 1.0]; 5], 7);
        failed.0[2][1] = Err("a reply has wrong bytes".into());
        let advice = subject.advice(&WAYS, &failed, 0.2);
        assert!(advice.comparisons[1].contains("not known in upload"), "{advice:?}");
    }

    #[test]
    fn a_required_tier_that_is_not_reached_is_told() {
        let mut subject = kept_to(Tier::Splice, TierLimit::Auto, "x");
        subject.required = Some(Tier::Direct);
        let advice = subject.advice(&[None], &results([[1.0; 3]; 5], 7), 0.2);
        assert!(advice.comparisons[1].starts_with("direct is required"));
        assert_eq!(advice.recommendation, "none, because splice could not be measured");
    }

    #[test]
    fn nothing_is_compared_while_others_are_busy() {
        let subject = kept_to(Tier::Splice, TierLimit::Auto, "x");
        let advice = subject.advice(&WAYS, &results([[1.9, 1.0, 1.0]; 5], 7), 1.2);
        assert_eq!(advice.comparisons, ["Route orders-db is carried by splice here."]);
        assert!(advice.recommendation.starts_with("none, because other programs kept 1.2 of"));
    }
}

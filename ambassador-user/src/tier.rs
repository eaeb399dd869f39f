//! The ladder: which tier carries a route, and why each higher one does not.
#![forbid(unsafe_code)]

use anyhow::{Result, ensure};

use crate::config::{Config, Tier, TierLimit};
use crate::datapath;
use crate::proxy::splice;

/// The exit code that says so (EX_NOPERM of sysexits.h).
pub const REQUIRED_TIER_MISSING: u8 = 77;

/// Every tier, from the highest to the lowest.
pub const TIERS: [Tier; 4] = [Tier::Direct, Tier::Sockmap, Tier::Splice, Tier::Copy];

/// What of each tier works on this machine.
#[derive(Debug)]
pub struct Ladder {
    /// Why `splice` cannot be used; `None` when it can.
    no_splice: Option<String>,
}

impl Ladder {
    /// Finds out by moving real bytes; takes less than a millisecond.
    pub fn probe() -> Self {
        Self { no_splice: splice::probe().err().map(|error| format!("{error:#}")) }
    }

    /// Why a tier cannot be used here; `None` when it can.
    pub fn obstacle(&self, tier: Tier) -> Option<&str> {
        match tier {
            Tier::Direct | Tier::Sockmap if datapath::object().is_none() => {
                Some("this binary was built without the eBPF object")
            }
            Tier::Direct | Tier::Sockmap => Some("not in this version, which works in user space"),
            Tier::Splice => self.no_splice.as_deref(),
            Tier::Copy => None,
        }
    }

    /// Whether every route reaches the tier that is required.
    pub fn satisfies(&self, config: &Config) -> Result<()> {
        let Some(required) = config.acceleration.require else { return Ok(()) };
        for route in &config.routes {
            let (tier, why) = self.choose(route.tier);
            ensure!(
                tier >= required,
                "route {} would be carried by {tier}, and {required} is required ({why}); lower `require` \
             or see `ambassador doctor`",
                route.name
            );
        }
        Ok(())
    }

    /// The highest tier that is allowed and works, and why no higher one.
    pub fn choose(&self, limit: TierLimit) -> (Tier, String) {
        let mut why_not = Vec::new();
        for tier in TIERS {
            match self.obstacle(tier) {
                _ if !limit.allows(tier) => {
                    why_not.push(format!("{tier}: not allowed (tier: {limit})"))
                }
                Some(obstacle) => why_not.push(format!("{tier}: {obstacle}")),
                None => return (tier, why_not.join("; ")),
            }
        }
        (Tier::Copy, why_not.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Ladder = Ladder { no_splice: None };

    #[test]
    fn auto_takes_the_best_that_works() {
        assert_eq!(GOOD.choose(TierLimit::Auto).0, Tier::Splice);
        let bad = Ladder { no_splice: Some("splice(2) is refused".to_owned()) };
        let (tier, reason) = bad.choose(TierLimit::Auto);
        assert_eq!(tier, Tier::Copy);
        assert!(reason.contains("splice: splice(2) is refused"), "{reason}");
    }

    #[test]
    fn a_limit_is_never_exceeded_and_is_told_as_the_reason() {
        let (tier, reason) = GOOD.choose(TierLimit::AtMost(Tier::Copy));
        assert_eq!(tier, Tier::Copy);
        assert!(reason.contains("splice: not allowed (tier: copy)"), "{reason}");
    }

    #[test]
    fn splice_works_where_the_tests_run() {
        assert_eq!(Ladder::probe().obstacle(Tier::Splice), None);
    }
}

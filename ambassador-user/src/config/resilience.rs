//! What is meant to happen when hosts fail, or are asked too much of.

use std::num::NonZeroU32;
use std::time::Duration;

use super::Ask;

/// What one address of an upstream gets of a route at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Most connections.
    pub connections: Option<NonZeroU32>,
    /// Most connections that are on their way.
    pub pending: Option<NonZeroU32>,
}

/// What becomes of connections to a host that is not healthy any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnUnhealthy {
    /// They may still work, and an app notices when they do not.
    #[default]
    Keep,
    /// They are reset, so that the app connects anew at once.
    Close,
}

/// How it is found out whether hosts work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// What a host is asked, once it is connected to.
    pub ask: Ask,
    /// Between two checks of a host, a tenth more or less.
    pub interval: Duration,
    /// For one check.
    pub timeout: Duration,
    /// Checks in a row that fail until a host is down.
    pub fall: NonZeroU32,
    /// Checks in a row that pass until it is up again.
    pub rise: NonZeroU32,
    /// For how long a host that is back does not get its full share.
    pub slow_start: Duration,
}

/// When a host is taken out because of what became of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Eject {
    /// Connects that failed, or connections that were reset before they brought a byte, in a row.
    pub consecutive_failures: NonZeroU32,
    /// For how long at first; longer when it happens again.
    pub lasting: Duration,
    /// Of an upstream's hosts, at most so many are out at a time; one always stays.
    pub max_percent: u8,
}

impl Health {
    /// This check, and all else by default.
    pub fn of(ask: Ask) -> Self {
        Self {
            ask,
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(1),
            fall: const { NonZeroU32::new(3).unwrap() },
            rise: const { NonZeroU32::new(2).unwrap() },
            slow_start: Duration::ZERO,
        }
    }
}

impl Default for Eject {
    fn default() -> Self {
        Self {
            consecutive_failures: const { NonZeroU32::new(5).unwrap() },
            lasting: Duration::from_secs(5),
            max_percent: 50,
        }
    }
}

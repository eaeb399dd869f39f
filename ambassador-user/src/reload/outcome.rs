//! What came of a reload, as it is told.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use anyhow::Error;
use serde::{Deserialize, Serialize};

use crate::config::{BAD_CONFIG, ConfigError};
use crate::route::Route;
use crate::tier::REQUIRED_TIER_MISSING;

/// What came of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Done(Changes),
    Refused(Refusal),
}

/// What is different now.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Changes {
    /// The names of routes.
    pub added: Vec<String>,
    pub changed: Vec<String>,
    pub removed: Vec<String>,
    /// The keys of settings.
    pub settings: Vec<String>,
    /// Keys that differ from what is in force, and stay so until a restart.
    pub needs_restart: Vec<String>,
}

/// Why everything stays as it was.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refusal {
    pub why: String,
    /// What a command that asked for it exits with.
    pub code: u8,
}

impl Outcome {
    /// As metrics name it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Done(changes) if changes.is_empty() => "unchanged",
            Self::Done(_) => "ok",
            Self::Refused(_) => "refused",
        }
    }
}

impl Changes {
    pub(super) fn between(
        before: &[Arc<Route>],
        after: &[Arc<Route>],
        settings: Vec<String>,
        needs_restart: Vec<String>,
    ) -> Self {
        let mut changes = Self { settings, needs_restart, ..Self::default() };
        let mut left: HashMap<_, _> = before.iter().map(|route| (&route.name, route)).collect();
        for route in after {
            match left.remove(&route.name) {
                None => changes.added.push(route.name.to_string()),
                Some(before) if Arc::ptr_eq(before, route) => {}
                Some(_) => changes.changed.push(route.name.to_string()),
            }
        }
        changes.removed = left.into_keys().map(ToString::to_string).collect();
        changes.removed.sort_unstable();
        changes
    }

    pub fn is_empty(&self) -> bool {
        [&self.added, &self.changed, &self.removed, &self.settings].iter().all(|it| it.is_empty())
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            f.write_str("nothing has changed")?;
        }
        let mut between = "";
        for (what, names) in [
            ("routes added", &self.added),
            ("routes changed", &self.changed),
            ("routes removed", &self.removed),
            ("settings changed", &self.settings),
        ] {
            if !names.is_empty() {
                write!(f, "{between}{what}: {}", names.join(", "))?;
                between = "; ";
            }
        }
        if !self.needs_restart.is_empty() {
            write!(f, "; needs a restart, and is as it was: {}", self.needs_restart.join(", "))?;
        }
        Ok(())
    }
}

impl Refusal {
    pub(super) fn bad(error: ConfigError) -> Self {
        Self { why: error.to_string(), code: BAD_CONFIG }
    }

    pub(super) fn missing_tier(error: Error) -> Self {
        Self { why: format!("{error:#}"), code: REQUIRED_TIER_MISSING }
    }

    pub(super) fn failed(error: Error) -> Self {
        Self { why: format!("{error:#}"), code: 1 }
    }

    pub(super) fn draining() -> Self {
        Self { why: "the ambassador is draining, and about to end".to_owned(), code: 1 }
    }
}

//! The settings that are one value, each with its grammar and its bounds.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use schemars::{Schema, json_schema};

use super::address::{ListenText, decimal, unix_path};
use super::problem::{Problem, quote};
use super::text::Written;
use super::words::{one_of, words};
use super::{Balance, OnUnhealthy, ReadyWhen, Tier, TierLimit};

/// A duration of at least `MIN` and at most `MAX` milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Within<const MIN: u64, const MAX: u64>(pub(crate) Duration);

/// A whole number from `MIN`, at least 1, to `MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Count<const MIN: u32, const MAX: u32>(pub(crate) NonZeroU32);

/// `admin.http`: an address, or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HttpText(pub(crate) Option<SocketAddr>);

/// `admin.control`: a socket, or `off`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ControlText(pub(crate) Option<PathBuf>);

/// `acceleration.require`: a tier, or `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RequireText(pub(crate) Option<Tier>);

/// The mode of a socket file, in octal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SocketMode(pub(crate) u32);

/// What a route's bytes are; only plain TCP in this release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Protocol;

impl<const MIN: u64, const MAX: u64> FromStr for Within<MIN, MAX> {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let bounds = format!("{} to {}", millis(MIN), millis(MAX));
        let duration = humantime::parse_duration(text).map_err(|_| {
            Problem::new(
                format!("{} is not a duration", quote(text)),
                format!("write a number with its unit, such as 500ms, 2s or 5m, {bounds}"),
            )
        })?;
        if duration < Duration::from_millis(MIN) || duration > Duration::from_millis(MAX) {
            return Err(Problem::new(
                format!("{} is out of bounds", quote(text)),
                format!("write {bounds}"),
            ));
        }
        Ok(Self(duration))
    }
}

/// Milliseconds as people write them.
fn millis(millis: u64) -> String {
    humantime::format_duration(Duration::from_millis(millis)).to_string()
}

impl<const MIN: u64, const MAX: u64> Written for Within<MIN, MAX> {
    const EXPECTED: &'static str = "a duration with its unit, such as 500ms, 2s or 5m";

    fn schema() -> Schema {
        json_schema!({
            "type": "string",
            "description": format!("A duration with its unit, {} to {}", millis(MIN), millis(MAX)),
            "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*[A-Za-zµ]+(\s*[0-9]+(\.[0-9]+)?\s*[A-Za-zµ]+)*\s*$",
            "examples": ["500ms", "2s", "5m"],
        })
    }
}

impl<const MIN: u32, const MAX: u32> FromStr for Count<MIN, MAX> {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let bounded =
            decimal(text).filter(|number: &NonZeroU32| (MIN..=MAX).contains(&number.get()));
        bounded.map(Self).ok_or_else(|| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let what = if digits { "is out of bounds" } else { "is not a whole number" };
            Problem::new(format!("{} {what}", quote(text)), format!("write {MIN} to {MAX}"))
        })
    }
}

impl<const MIN: u32, const MAX: u32> Written for Count<MIN, MAX> {
    const EXPECTED: &'static str = "a whole number";
    const NUMBER: bool = true;

    fn schema() -> Schema {
        json_schema!({ "type": "integer", "minimum": MIN, "maximum": MAX })
    }
}

impl FromStr for HttpText {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        if text == "off" {
            return Ok(Self(None));
        }
        match text.parse()? {
            ListenText::Address(address) => Ok(Self(Some(address))),
            ListenText::Port(port) => Err(Problem::new(
                format!("{port} does not say which address"),
                format!("write 0.0.0.0:{port} for probes of the kubelet, or 127.0.0.1:{port}"),
            )),
            ListenText::Unix(_) => Err(Problem::new(
                "probes and metrics are not served on a Unix socket",
                "write IP:PORT, or off",
            )),
        }
    }
}

impl Written for HttpText {
    const EXPECTED: &'static str = "an address such as 0.0.0.0:9090, or off";

    fn schema() -> Schema {
        json_schema!({ "type": "string", "examples": ["0.0.0.0:9090", "[::]:9090", "off"] })
    }
}

impl FromStr for ControlText {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        if text == "off" {
            return Ok(Self(None));
        }
        let path = text.strip_prefix("unix:").ok_or_else(|| {
            Problem::new(
                format!("{} is not a Unix socket", quote(text)),
                "write unix:PATH, such as unix:/run/ambassador/control.sock, or off",
            )
        })?;
        unix_path(path).map(|path| Self(Some(path)))
    }
}

impl Written for ControlText {
    const EXPECTED: &'static str = "unix:PATH, or off";

    fn schema() -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^(off|unix:/.*[^/])$",
            "examples": ["unix:/run/ambassador/control.sock", "off"],
        })
    }
}

impl FromStr for SocketMode {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let octal = text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
        match u32::from_str_radix(text, 8) {
            Ok(mode) if octal && matches!(text.len(), 3 | 4) && mode <= 0o777 => Ok(Self(mode)),
            _ => Err(Problem::new(
                format!("{} is not a file mode", quote(text)),
                "write three octal digits after a 0, in quotes, such as \"0660\"",
            )),
        }
    }
}

impl Written for SocketMode {
    const EXPECTED: &'static str = "a file mode in quotes, such as \"0660\"";

    fn schema() -> Schema {
        json_schema!({ "type": "string", "pattern": "^0?[0-7]{3}$", "examples": ["0660"] })
    }
}

const TIERS: [(&str, Tier); 4] = [
    ("direct", Tier::Direct),
    ("sockmap", Tier::Sockmap),
    ("splice", Tier::Splice),
    ("copy", Tier::Copy),
];

impl FromStr for Tier {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        one_of(text, "tier", &TIERS, &[])
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Sockmap => "sockmap",
            Self::Splice => "splice",
            Self::Copy => "copy",
        })
    }
}

impl FromStr for TierLimit {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let limits = TIERS.map(|(word, tier)| (word, Self::AtMost(tier)));
        one_of(text, "tier", &[&[("auto", Self::Auto)], &limits[..]].concat(), &[])
    }
}

impl fmt::Display for TierLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::AtMost(tier) => write!(f, "{tier}"),
        }
    }
}

impl Written for TierLimit {
    const EXPECTED: &'static str = "a tier: auto, direct, sockmap, splice or copy";

    fn schema() -> Schema {
        json_schema!({ "type": "string", "enum": ["auto", "direct", "sockmap", "splice", "copy"] })
    }
}

impl FromStr for RequireText {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let tiers = TIERS.map(|(word, tier)| (word, Some(tier)));
        one_of(text, "tier", &[&[("none", None)], &tiers[..]].concat(), &[]).map(Self)
    }
}

impl Written for RequireText {
    const EXPECTED: &'static str = "a tier to require: none, direct, sockmap, splice or copy";

    fn schema() -> Schema {
        json_schema!({ "type": "string", "enum": ["none", "direct", "sockmap", "splice", "copy"] })
    }
}

impl FromStr for Protocol {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let later = ["redis", "postgres", "mysql", "mongodb", "http", "tls"];
        one_of(text, "protocol", &[("tcp", Self)], &later)
    }
}

impl Written for Protocol {
    const EXPECTED: &'static str = "a protocol: tcp";

    fn schema() -> Schema {
        json_schema!({ "type": "string", "const": "tcp" })
    }
}

words! {
    ReadyWhen, a "choice", expected "bound or healthy":
    "bound" = Bound, "healthy" = Healthy
}

words! {
    OnUnhealthy, a "choice", expected "keep or close":
    "keep" = Keep, "close" = Close
}

words! {
    Balance, a "balance",
    expected "a balance: failover, failover_sticky, round_robin, least_connections, random_two or source_hash":
    "failover" = Failover, "failover_sticky" = FailoverSticky, "round_robin" = RoundRobin,
    "least_connections" = LeastConnections, "random_two" = RandomTwo, "source_hash" = SourceHash
}

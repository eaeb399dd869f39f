//! The values within a check, each with its grammar and its bounds.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use schemars::{Schema, json_schema};

use crate::config::address::decimal;
use crate::config::problem::{Problem, quote};
use crate::config::text::Written;
use crate::config::words::words;

/// What a service is among its copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one that takes writes.
    Primary,
    Replica,
}

/// The status codes that are well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statuses(pub RangeInclusive<u16>);

/// The path of a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpPath(pub String);

/// What may stand in a `Host` header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpHost(pub String);

/// The absolute path of a file with a password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PasswordFile(pub PathBuf);

/// A user or a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account(pub String);

impl Default for Statuses {
    fn default() -> Self {
        Self(200..=399)
    }
}

impl FromStr for HttpPath {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        if text.starts_with('/') && text.len() <= 1024 && text.bytes().all(|b| b.is_ascii_graphic())
        {
            return Ok(Self(text.to_owned()));
        }
        Err(Problem::new(
            format!("{} is not the path of a URL", quote(text)),
            "write one such as /healthz, other characters than ASCII as %XX",
        ))
    }
}

impl Written for HttpPath {
    const EXPECTED: &'static str = "the path of a URL, such as /healthz";

    fn schema() -> Schema {
        json_schema!({ "type": "string", "pattern": "^/[!-~]*$", "examples": ["/healthz"] })
    }
}

impl FromStr for HttpHost {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte);
        if (1..=255).contains(&text.len()) && text.bytes().all(allowed) {
            return Ok(Self(text.to_owned()));
        }
        Err(Problem::new(format!("{} is not a host", quote(text)), "write HOST or HOST:PORT"))
    }
}

impl Written for HttpHost {
    const EXPECTED: &'static str = "a host, such as api.example.com";

    fn schema() -> Schema {
        json_schema!({ "type": "string", "pattern": "^[A-Za-z0-9._:\\[\\]-]{1,255}$" })
    }
}

impl FromStr for Statuses {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let code = |text| decimal(text).filter(|code| (100..=599).contains(code));
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (code(first), code(last)) {
            (Some(first), Some(last)) if first <= last => Ok(Self(first..=last)),
            _ => Err(Problem::new(
                format!("{} is not a status", quote(text)),
                "write 100 to 599, or a range such as 200-399",
            )),
        }
    }
}

impl fmt::Display for Statuses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.0.start(), self.0.end());
        if first == last { write!(f, "{first}") } else { write!(f, "{first}-{last}") }
    }
}

impl Written for Statuses {
    const EXPECTED: &'static str = "a status, or a range such as 200-399";
    const NUMBER: bool = true;

    fn schema() -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "integer", "minimum": 100, "maximum": 599 },
                { "type": "string", "pattern": "^[1-5][0-9]{2}(-[1-5][0-9]{2})?$" },
            ],
            "examples": [200, "200-399"],
        })
    }
}

words! {
    Role, a "role", expected "a role: primary (or master), or replica":
    "primary" = Primary, "replica" = Replica; also "master" = Primary
}

impl FromStr for PasswordFile {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let path = Path::new(text);
        if path.is_absolute() && !text.chars().any(char::is_control) {
            return Ok(Self(path.to_owned()));
        }
        Err(Problem::new(
            format!("{} is not the absolute path of a file", quote(text)),
            "write the path of a file with the password, such as /run/secrets/db/password",
        ))
    }
}

impl Written for PasswordFile {
    const EXPECTED: &'static str = "the absolute path of a file with a password";

    fn schema() -> Schema {
        json_schema!({ "type": "string", "pattern": "^/", "examples": ["/run/secrets/db/password"] })
    }
}

impl FromStr for Account {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        if (1..=255).contains(&text.len()) && !text.chars().any(char::is_control) {
            return Ok(Self(text.to_owned()));
        }
        Err(Problem::new(format!("{} names nobody", quote(text)), "write 1 to 255 characters"))
    }
}

impl Written for Account {
    const EXPECTED: &'static str = "a name";

    fn schema() -> Schema {
        json_schema!({ "type": "string", "minLength": 1, "maxLength": 255 })
    }
}

//! Names of routes and upstreams: what people type, and what metrics and logs carry.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use schemars::{Schema, json_schema};

use super::problem::{Problem, quote};
use super::text::Written;
use super::{Listen, Target};

/// The longest name.
const LONGEST: usize = 63;

/// A name: a letter, then letters, digits, `-` and `_`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Name(Arc<str>);

impl Name {
    pub(crate) fn shared(&self) -> Arc<str> {
        self.0.clone()
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// A name for a route that was given none: its upstream's host, or else its port.
    pub(crate) fn derived(target: &Target, listen: &Listen) -> Self {
        let upstream = match target {
            Target::Name { host, .. } => host.split('.').next(),
            // After the service and the protocol.
            Target::Service(name) => name.split('.').nth(2),
            Target::Address(_) => None,
            Target::Unix(path) => stem(path),
        };
        let fallback = || match listen {
            Listen::Tcp { address, .. } => format!("port-{}", address.port()),
            Listen::Unix(path) => stem(path).unwrap_or("socket").to_owned(),
        };
        upstream
            .and_then(|name| name.parse().ok())
            .or_else(|| fallback().parse().ok())
            .unwrap_or_else(|| Self("route".into()))
    }

    /// This name, or the first of `NAME-2`, `NAME-3`... that is not taken.
    pub(crate) fn unique(self, taken: impl Fn(&Self) -> bool) -> Self {
        if !taken(&self) {
            return self;
        }
        let mut number = 2_u32;
        loop {
            let suffix = format!("-{number}");
            let kept = &self.0[..self.0.len().min(LONGEST - suffix.len())];
            let numbered = Self(format!("{kept}{suffix}").into());
            if !taken(&numbered) {
                return numbered;
            }
            number += 1;
        }
    }
}

fn stem(path: &Path) -> Option<&str> {
    path.file_stem().and_then(|stem| stem.to_str())
}

impl FromStr for Name {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let letter_first = text.starts_with(|first: char| first.is_ascii_alphabetic());
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if !letter_first || !text.bytes().all(allowed) || text.len() > LONGEST {
            return Err(Problem::new(
                format!("{} is not a name", quote(text)),
                format!("write a letter, then letters, digits, - and _, at most {LONGEST} in all"),
            ));
        }
        if text == "unix" || text == "localhost" {
            return Err(Problem::new(
                format!("{text} is no name, because it begins an address"),
                "choose another name",
            ));
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Written for Name {
    const EXPECTED: &'static str = "a name such as orders-db";

    fn schema() -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^[A-Za-z][A-Za-z0-9_-]{0,62}$",
            "examples": ["orders-db"],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::address::{EndpointText, ListenText};

    fn derived(listen: &str, endpoint: &str) -> String {
        let listen = listen.parse::<ListenText>().unwrap().meaning().remove(0);
        Name::derived(&endpoint.parse::<EndpointText>().unwrap().target, &listen).to_string()
    }

    #[test]
    fn a_route_without_a_name_is_named_after_its_upstream_or_its_port() {
        assert_eq!(derived("5432", "orders-db.prod.svc:5432"), "orders-db");
        assert_eq!(derived("5432", "10.0.0.1:5432"), "port-5432");
        assert_eq!(derived("5432", "localhost:6543"), "port-5432");
        assert_eq!(derived("5432", "0.redis:5432"), "port-5432");
        assert_eq!(derived("5432", "unix:/run/mysqld.sock"), "mysqld");
        assert_eq!(derived("unix:/run/pg.sock", "10.0.0.1:5432"), "pg");
        assert_eq!(derived("unix:/run/.s.PGSQL.5432", "10.0.0.1:5432"), "route");
    }

    #[test]
    fn a_taken_name_gets_a_number_and_stays_a_name() {
        let long: Name = "x".repeat(LONGEST).parse().unwrap();
        let taken = [long.clone(), format!("{}-2", "x".repeat(LONGEST - 2)).parse().unwrap()];
        let unique = long.unique(|name| taken.contains(name));
        assert_eq!(unique.to_string(), format!("{}-3", "x".repeat(LONGEST - 2)));
        assert!(unique.as_str().parse::<Name>().is_ok());
    }

    #[test]
    fn what_begins_an_address_is_no_name() {
        for text in ["", "unix", "localhost", "1db", "-db", "db.prod", "d b", "dä", "x\0"] {
            assert!(text.parse::<Name>().is_err(), "{text:?}");
        }
    }
}

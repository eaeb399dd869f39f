//! A whole route on one line: `[NAME:]LISTEN=ENDPOINT[,ENDPOINT...]`, as flags and variables carry it.
//!
//! Endpoints are tried in the order written; where one has a weight, connections are spread over
//! all of them by weight instead, because weights mean nothing to failover.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use super::Balance;
use super::address::{EndpointText, ListenText};
use super::name::Name;
use super::problem::{Problem, quote};

/// A route as it is written on one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RouteText {
    pub(crate) name: Option<Name>,
    pub(crate) listen: ListenText,
    pub(crate) endpoints: Vec<EndpointText>,
}

impl RouteText {
    /// How the endpoints are chosen from.
    pub(crate) fn balance(&self) -> Balance {
        if self.endpoints.iter().any(|endpoint| endpoint.weight.is_some()) {
            Balance::RoundRobin
        } else {
            Balance::Failover
        }
    }
}

impl FromStr for RouteText {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let (head, tail) = text.split_once('=').ok_or_else(|| {
            Problem::new(
                format!("{} has no =", quote(text)),
                "write LISTEN=ENDPOINT, such as 5432=orders-db.prod.svc:5432",
            )
        })?;
        let (name, listen) = match name_before(head) {
            Some((name, listen)) => (Some(name.parse()?), listen),
            None => (None, head),
        };
        let endpoints = tail.split(',').map(str::parse).collect::<Result<_, _>>()?;
        Ok(Self { name, listen: listen.parse()?, endpoints })
    }
}

/// Cuts `NAME:LISTEN`. What begins with a letter is a name, unless it is an address by its form.
fn name_before(head: &str) -> Option<(&str, &str)> {
    let (name, listen) = head.split_once(':')?;
    // fe80::1:5432 is an address without brackets, and is refused as such.
    let is_address = head.parse::<Ipv6Addr>().is_ok() || matches!(name, "unix" | "localhost");
    let is_name = name.starts_with(|first: char| first.is_ascii_alphabetic());
    (is_name && !is_address && !name.contains('.')).then_some((name, listen))
}

impl fmt::Display for RouteText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = &self.name {
            write!(f, "{name}:")?;
        }
        write!(f, "{}=", self.listen)?;
        for (index, endpoint) in self.endpoints.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{endpoint}")?;
        }
        Ok(())
    }
}

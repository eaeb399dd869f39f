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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::address::tests::{any_endpoint, any_listen, nearly_an_address};

    fn parse(text: &str) -> Result<RouteText, String> {
        text.parse().map_err(|problem: Problem| problem.to_string())
    }

    #[test]
    fn a_name_is_told_from_an_address_by_its_form() {
        for (text, name, listen) in [
            ("5432=db:1", None, "5432"),
            ("db:5432=db:1", Some("db"), "5432"),
            ("127.0.0.1:5432=db:1", None, "127.0.0.1:5432"),
            ("db:127.0.0.1:5432=db:1", Some("db"), "127.0.0.1:5432"),
            ("[::1]:5432=db:1", None, "[::1]:5432"),
            ("db:[::1]:5432=db:1", Some("db"), "[::1]:5432"),
            ("unix:/run/a.sock=db:1", None, "unix:/run/a.sock"),
            ("db:unix:/run/a.sock=db:1", Some("db"), "unix:/run/a.sock"),
            ("fe:80=db:1", Some("fe"), "80"),
        ] {
            let route = parse(text).unwrap();
            assert_eq!(route.name.as_ref().map(Name::as_str), name, "{text}");
            assert_eq!(route.listen.to_string(), listen, "{text}");
        }
    }

    #[test]
    fn what_looks_like_a_name_and_is_none_is_explained() {
        assert!(parse("localhost:80=db:1").unwrap_err().contains("write 80 for localhost"));
        assert!(parse("fe80::1:80=db:1").unwrap_err().contains("write [IP6]:PORT"));
        assert!(parse("db.prod:80=db:1").unwrap_err().contains("not an IP address"));
        assert!(parse("d b:80=db:1").unwrap_err().contains("is not a name"));
        assert!(parse("5432").unwrap_err().contains("5432=orders-db.prod.svc:5432"));
    }

    #[test]
    fn a_weight_asks_for_a_share() {
        assert_eq!(parse("1=a:1,b:1").unwrap().balance(), Balance::Failover);
        assert_eq!(parse("1=a:1,b:1:1").unwrap().balance(), Balance::RoundRobin);
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused_in_one_line(
            head in nearly_an_address(),
            tail in nearly_an_address(),
        ) {
            match parse(&format!("{head}={tail}")) {
                Ok(route) => prop_assert_eq!(parse(&route.to_string()), Ok(route)),
                Err(refusal) => prop_assert!(!refusal.chars().any(char::is_control)),
            }
        }

        #[test]
        fn every_route_survives_being_written_and_read(
            name in proptest::option::of("n[a-z0-9_-]{0,62}"),
            listen in any_listen(),
            endpoints in proptest::collection::vec(any_endpoint(), 1..5),
        ) {
            let name = name.map(|name| name.parse().unwrap());
            let route = RouteText { name, listen, endpoints };
            prop_assert_eq!(parse(&route.to_string()), Ok(route));
        }
    }
}

//! The grammar of addresses: where a route listens and where an endpoint is reached.
//!
//! ```text
//! LISTEN    PORT | IP:PORT | [IP6]:PORT | unix:PATH        PORT: 127.0.0.1, and ::1 where there is one
//! ENDPOINT  HOST:PORT[:WEIGHT] | [IP6]:PORT[:WEIGHT] | srv:NAME[:WEIGHT] | unix:PATH
//! ```
//!
//! The parsers are strict, and each refusal says what to write instead.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use schemars::{Schema, json_schema};

use super::problem::{Problem, quote};
use super::text::Written;
use super::{Endpoint, Listen, Target};

/// The largest weight: enough for a share of one per mille.
pub(crate) const MAX_WEIGHT: u16 = 1000;

/// The longest path that fits a Unix socket address beside its closing NUL.
const MAX_UNIX_PATH: usize = 107;

/// LISTEN as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ListenText {
    Port(NonZeroU16),
    Address(SocketAddr),
    Unix(PathBuf),
}

/// ENDPOINT as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EndpointText {
    pub(crate) target: Target,
    /// `None`: not written.
    pub(crate) weight: Option<NonZeroU16>,
}

impl ListenText {
    /// The addresses it stands for.
    pub(crate) fn meaning(&self) -> Vec<Listen> {
        let tcp = |address, if_available| Listen::Tcp { address, if_available };
        match self {
            Self::Port(port) => vec![
                tcp((Ipv4Addr::LOCALHOST, port.get()).into(), false),
                tcp((Ipv6Addr::LOCALHOST, port.get()).into(), true),
            ],
            Self::Address(address) => vec![tcp(*address, false)],
            Self::Unix(path) => vec![Listen::Unix(path.clone())],
        }
    }
}

impl EndpointText {
    /// The endpoint it stands for.
    pub(crate) fn meaning(&self) -> Endpoint {
        Endpoint { target: self.target.clone(), weight: self.weight.unwrap_or(NonZeroU16::MIN) }
    }
}

impl FromStr for ListenText {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        if let Some(path) = text.strip_prefix("unix:") {
            return unix_path(path).map(Self::Unix);
        }
        if text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty() {
            return port(text).map(Self::Port);
        }
        if text.starts_with('/') {
            return Err(Problem::new(
                format!("{} looks like a path", quote(text)),
                "write unix:PATH to listen on a Unix socket",
            ));
        }
        let (host, port_text) = split_host(text)?;
        let port = port(port_text.ok_or_else(|| no_port(text))?)?.get();
        if let Some(address) = bracketed(host, port)? {
            return match address.ip().to_canonical() {
                IpAddr::V6(_) => Ok(Self::Address(address)),
                IpAddr::V4(ip) => Err(Problem::new(
                    format!("{host} is an IPv4 address in IPv6 form"),
                    format!("write {ip}:{port}"),
                )),
            };
        }
        match host.parse::<Ipv4Addr>() {
            Ok(ip) => Ok(Self::Address((ip, port).into())),
            Err(_) => Err(Problem::new(
                format!("{} is not an IP address to listen on", quote(host)),
                format!(
                    "write {port} for localhost, 0.0.0.0:{port} for every interface, or IP:{port}"
                ),
            )),
        }
    }
}

impl FromStr for EndpointText {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self { target: Target::Unix(unix_path(path)?), weight: None });
        }
        if text.contains("://") {
            return Err(Problem::new(
                format!("{} is a URL", quote(text)),
                "write HOST:PORT, without scheme, user and path",
            ));
        }
        if text.starts_with('/') {
            return Err(Problem::new(
                format!("{} looks like a path", quote(text)),
                "write unix:PATH for a Unix socket",
            ));
        }
        let (host, rest) = split_host(text)?;
        let rest = rest.ok_or_else(|| no_port(text))?;
        // A host may be called srv; what is no port is a name.
        if host == "srv" && !rest.starts_with(|first: char| first.is_ascii_digit()) {
            return service(rest);
        }
        let (port_text, weight_text) = match rest.split_once(':') {
            Some((port, weight)) => (port, Some(weight)),
            None => (rest, None),
        };
        let port = port(port_text)?.get();
        let target = if let Some(address) = bracketed(host, port)? {
            Target::Address(address)
        } else if let Ok(ip) = host.parse::<Ipv4Addr>() {
            Target::Address((ip, port).into())
        } else {
            host_name(host)?;
            Target::Name { host: host.into(), port }
        };
        Ok(Self { target, weight: weight_text.map(weight).transpose()? })
    }
}

/// Cuts `HOST:REST` or `[IP6]:REST` after the host; the rest is `None` where nothing follows.
fn split_host(text: &str) -> Result<(&str, Option<&str>), Problem> {
    if text.is_empty() {
        return Err(Problem::new("an address is empty", "write HOST:PORT"));
    }
    if let Some(character) = text.chars().find(|c| c.is_control() || c.is_whitespace()) {
        return Err(Problem::new(
            format!("{} contains {character:?}", quote(text)),
            "write it without spaces and control characters",
        ));
    }
    let without_port = text.rsplit_once(':').map_or(text, |(head, _)| head);
    if text.parse::<Ipv6Addr>().is_ok() || without_port.parse::<Ipv6Addr>().is_ok() {
        return Err(Problem::new(
            format!("{} is an IPv6 address without brackets", quote(text)),
            "write [IP6]:PORT, such as [::1]:5432",
        ));
    }
    let end = if text.starts_with('[') {
        text.find(']').map(|bracket| bracket + 1).ok_or_else(|| {
            Problem::new(format!("{} lacks a closing bracket", quote(text)), "write [IP6]:PORT")
        })?
    } else {
        text.find(':').unwrap_or(text.len())
    };
    let (host, rest) = text.split_at(end);
    match rest.strip_prefix(':') {
        Some(rest) => Ok((host, Some(rest))),
        None if rest.is_empty() => Ok((host, None)),
        None => Err(Problem::new(
            format!("{} follows the bracket in {}", quote(rest), quote(text)),
            "write [IP6]:PORT",
        )),
    }
}

/// The address, if `host` is an IPv6 address in brackets.
fn bracketed(host: &str, port: u16) -> Result<Option<SocketAddr>, Problem> {
    if !host.starts_with('[') {
        return Ok(None);
    }
    match format!("{host}:{port}").parse::<SocketAddrV6>() {
        Ok(address) => Ok(Some(address.into())),
        Err(_) => Err(Problem::new(
            format!("{} is not an IPv6 address", quote(host)),
            "write brackets around an IPv6 address only, such as [::1]:5432",
        )),
    }
}

fn no_port(text: &str) -> Problem {
    Problem::new(format!("{} has no port", quote(text)), "add :PORT, such as db:5432")
}

pub(crate) fn port(text: &str) -> Result<NonZeroU16, Problem> {
    if text == "0" {
        return Err(Problem::new(
            "port 0 would be a different port at every start",
            "write the port that clients use, 1 to 65535",
        ));
    }
    decimal(text)
        .ok_or_else(|| Problem::new(format!("{} is not a port", quote(text)), "write 1 to 65535"))
}

fn weight(text: &str) -> Result<NonZeroU16, Problem> {
    decimal(text).filter(|weight: &NonZeroU16| weight.get() <= MAX_WEIGHT).ok_or_else(|| {
        Problem::new(
            format!("{} is not a weight", quote(text)),
            format!("write 1 to {MAX_WEIGHT}, or leave the endpoint out to give it nothing"),
        )
    })
}

/// A number of digits only, without sign or leading zero.
pub(super) fn decimal<T: FromStr>(text: &str) -> Option<T> {
    let strict = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    strict.then(|| text.parse().ok()).flatten()
}

/// Checks a path that a Unix socket is bound or connected to.
pub(crate) fn unix_path(text: &str) -> Result<PathBuf, Problem> {
    let problem = |what: &str, fix: &str| Err(Problem::new(format!("{} {what}", quote(text)), fix));
    if text.is_empty() {
        return Err(Problem::new("unix: has no path", "write unix:/absolute/path.sock"));
    }
    if text.starts_with('@') {
        return problem("is an abstract socket, which file modes cannot guard", "write unix:/PATH");
    }
    if text.chars().any(char::is_control) {
        return problem("contains a control character", "write a path of printable characters");
    }
    if !text.starts_with('/') {
        return problem("is a relative path", "write it from the root: unix:/PATH");
    }
    if text.ends_with('/') || Path::new(text).file_name().is_none() {
        return problem("is a directory", "write the path of the socket in it");
    }
    if text.len() > MAX_UNIX_PATH {
        return problem(
            &format!("has {} bytes, more than a socket address holds", text.len()),
            &format!("write a path of at most {MAX_UNIX_PATH} bytes"),
        );
    }
    Ok(PathBuf::from(text))
}

/// NAME or NAME:WEIGHT of a service, as its SRV records have it.
fn service(text: &str) -> Result<EndpointText, Problem> {
    let (name, weight_text) = text.split_once(':').map_or((text, None), |(n, w)| (n, Some(w)));
    host_name(name)?;
    let labels: Vec<&str> = name.splitn(3, '.').collect();
    if labels.len() < 3 || !labels[..2].iter().all(|label| label.starts_with('_')) {
        return Err(Problem::new(
            format!("{} is not the name of SRV records", quote(name)),
            "write srv:_SERVICE._tcp.NAME, such as srv:_redis._tcp.redis.default.svc.cluster.local",
        ));
    }
    let weight = weight_text.map(weight).transpose()?;
    Ok(EndpointText { target: Target::Service(name.into()), weight })
}

/// Checks a name that DNS or /etc/hosts can know.
fn host_name(host: &str) -> Result<(), Problem> {
    let problem = |what: &str, fix: &str| Err(Problem::new(format!("{} {what}", quote(host)), fix));
    let absolute = host.strip_suffix('.').unwrap_or(host);
    if absolute.is_empty() {
        return Err(Problem::new("an endpoint has no host", "write HOST:PORT, such as db:5432"));
    }
    if !host.is_ascii() {
        return problem("is not ASCII", "write the name in its xn-- form");
    }
    if absolute.len() > 253 {
        return problem("is longer than a host name can be", "write at most 253 characters");
    }
    for label in absolute.split('.') {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if label.is_empty() || label.len() > 63 || !label.bytes().all(allowed) {
            return problem(
                "is not a host name",
                "write labels of 1 to 63 letters, digits, - and _, with dots between",
            );
        }
        if label.starts_with('-') || label.ends_with('-') {
            return problem("has a label that begins or ends with -", "write the name without it");
        }
    }
    let last = absolute.rsplit('.').next().unwrap_or(absolute);
    if last.bytes().all(|byte| byte.is_ascii_digit()) {
        return problem(
            "is neither a host name nor an IPv4 address",
            "write it as A.B.C.D or a name",
        );
    }
    Ok(())
}

impl fmt::Display for ListenText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(f, "{port}"),
            Self::Address(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl fmt::Display for EndpointText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.target)?;
        match self.weight {
            Some(weight) => write!(f, ":{weight}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { address, .. } => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name { host, port } => write!(f, "{host}:{port}"),
            Self::Service(name) => write!(f, "srv:{name}"),
            Self::Address(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The grammar of ENDPOINT without a weight: what a probe connects to.
impl FromStr for Target {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        match text.parse()? {
            EndpointText { target, weight: None } => Ok(target),
            EndpointText { target, weight: Some(_) } => Err(Problem::new(
                format!("{} has a weight", quote(text)),
                format!("write {target}"),
            )),
        }
    }
}

impl Written for ListenText {
    const EXPECTED: &'static str = "an address such as 5432, 127.0.0.1:5432 or unix:/run/db.sock";
    const NUMBER: bool = true;

    fn schema() -> Schema {
        json_schema!({
            "type": ["string", "integer"],
            "minimum": 1,
            "maximum": u16::MAX,
            "description": "PORT (127.0.0.1, and ::1 where there is one), IP:PORT, [IP6]:PORT or unix:PATH",
            "pattern": r"^([1-9][0-9]{0,4}|[0-9.]+:[1-9][0-9]{0,4}|\[[0-9A-Fa-f:.%]+\]:[1-9][0-9]{0,4}|unix:/.*[^/])$",
            "examples": [5432, "127.0.0.1:5432", "[::1]:5432", "unix:/var/run/db/postgres.sock"],
        })
    }
}

impl Written for EndpointText {
    const EXPECTED: &'static str = "an endpoint such as db:5432, db:5432:3 or unix:/run/db.sock";

    fn schema() -> Schema {
        json_schema!({
            "type": "string",
            "description": "HOST:PORT[:WEIGHT], [IP6]:PORT[:WEIGHT], srv:NAME[:WEIGHT] (a service by its SRV records, which tell the ports) or unix:PATH; a weight is 1 to 1000",
            "pattern": r"^([A-Za-z0-9._-]+:[1-9][0-9]{0,4}(:[1-9][0-9]{0,3})?|\[[0-9A-Fa-f:.%]+\]:[1-9][0-9]{0,4}(:[1-9][0-9]{0,3})?|srv:_[A-Za-z0-9_-]+\._[A-Za-z0-9_-]+\.[A-Za-z0-9._-]+(:[1-9][0-9]{0,3})?|unix:/.*[^/])$",
            "examples": ["orders-db.prod.svc:5432", "redis-0:6379:3", "srv:_redis._tcp.redis.default.svc.cluster.local", "[fd00::1]:5432", "unix:/run/mysqld.sock"],
        })
    }
}

#[cfg(test)]
pub(crate) mod tests;

//! A service as people type it in the file: its endpoints, and how they are reached.

use std::collections::BTreeMap;
use std::num::NonZeroU16;

use schemars::JsonSchema;
use serde::Deserialize;

use super::health::CheckText;
use super::name::Name;
use super::problem::{ConfigError, Place, Problem, Warning};
use super::profile::{EndpointList, Reached};
use super::text::{OrNone, Text};
use super::value::{Count, Within};
use super::{Balance, Connect, Dns, Eject, Endpoint, Health, OnUnhealthy, Upstream};

/// A service and how to reach it.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping with the key endpoints or profiles")]
#[schemars(
    rename = "upstream",
    extend("oneOf" = [{ "required": ["endpoints"] }, { "required": ["profiles"] }])
)]
pub(super) struct UpstreamEntry {
    /// Where the service is reached.
    endpoints: Option<EndpointList>,
    /// Where the service is reached in each profile, by the profile's name.
    profiles: Option<BTreeMap<Text<Name>, EndpointList>>,
    /// How the next endpoint is chosen: failover takes the first that works, failover_sticky stays with
    /// it until it fails, round_robin takes turns by weight, least_connections takes the least busy for its
    /// weight, random_two the less busy of two drawn by weight, source_hash the same one for a source:
    /// apps of this Pod are one source, other clients go by their IP.
    #[schemars(extend("default" = "failover"))]
    balance: Option<Text<Balance>>,
    #[serde(default)]
    connect: ConnectText,
    #[serde(default)]
    dns: DnsText,
    /// How it is found out whether hosts work, or none: nobody asks.
    health: Option<OrNone<HealthText>>,
    /// When a host is taken out because of what became of connections, or none. A host is tried again
    /// before connections go there; the last good one is never taken out.
    eject: Option<OrNone<EjectText>>,
    /// What becomes of connections to an address that is not healthy any more: close resets them, so that
    /// apps connect anew at once.
    #[schemars(extend("default" = "keep"))]
    on_unhealthy: Option<Text<OnUnhealthy>>,
}

/// How a connection to the service is tried.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a mapping with the keys timeout, attempts and hold"
)]
#[schemars(rename = "connect")]
struct ConnectText {
    /// For one attempt.
    #[schemars(extend("default" = "2s"))]
    timeout: Option<Text<Within<1, 300_000>>>,
    /// Each on another endpoint, while there is one left.
    #[schemars(extend("default" = 3))]
    attempts: Option<Text<Count<1, 100>>>,
    /// How long a connection waits while no endpoint can be reached; 0s: it fails at once.
    #[schemars(extend("default" = "0s"))]
    hold: Option<Text<Within<0, 300_000>>>,
}

/// How long an answer of DNS is believed.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a mapping with the keys min_ttl, max_ttl and stale"
)]
#[schemars(rename = "dns")]
struct DnsText {
    /// At least so long, whatever the answer says.
    #[schemars(extend("default" = "1s"))]
    min_ttl: Option<Text<Within<1, 86_400_000>>>,
    /// At most so long, whatever the answer says.
    #[schemars(extend("default" = "30s"))]
    max_ttl: Option<Text<Within<1, 86_400_000>>>,
    /// Keep the last good addresses while DNS fails.
    #[schemars(extend("default" = true))]
    stale: Option<bool>,
}

/// How it is found out whether hosts work: each is asked by itself, and gets connections while it is up.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping with keys such as check and interval")]
#[schemars(rename = "health")]
struct HealthText {
    /// What a host is asked: tcp (whether it accepts a connection), redis, postgres, mysql, http or
    /// http:/PATH; or one of redis, postgres and http with options; or none.
    check: CheckText,
    /// Between two checks of a host, a tenth more or less.
    #[schemars(extend("default" = "5s"))]
    interval: Option<Text<Within<100, 3_600_000>>>,
    /// For one check.
    #[schemars(extend("default" = "1s"))]
    timeout: Option<Text<Within<10, 300_000>>>,
    /// Checks in a row that fail until a host is down; the very first one is believed at once.
    #[schemars(extend("default" = 3))]
    fall: Option<Text<Count<1, 100>>>,
    /// Checks in a row that pass until it is up again.
    #[schemars(extend("default" = 2))]
    rise: Option<Text<Count<1, 100>>>,
    /// For how long a host that is back gets less than its share, rising; where shares decide.
    #[schemars(extend("default" = "0s"))]
    slow_start: Option<Text<Within<0, 3_600_000>>>,
}

/// When a host is taken out because of what became of connections.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(
    deny_unknown_fields,
    default,
    expecting = "a mapping with the keys consecutive_failures, for and max_percent"
)]
#[schemars(rename = "eject")]
struct EjectText {
    /// Connects that failed, or connections that were reset before they brought a byte, in a row.
    #[schemars(extend("default" = 5))]
    consecutive_failures: Option<Text<Count<1, 1_000>>>,
    /// For how long at first; twice as long each time it still fails then, up to ten times.
    #[serde(rename = "for")]
    #[schemars(extend("default" = "5s"))]
    lasting: Option<Text<Within<100, 3_600_000>>>,
    /// Of the upstream's hosts, at most so many percent are out at a time.
    #[schemars(extend("default" = 50))]
    max_percent: Option<Text<Count<1, 100>>>,
}

impl UpstreamEntry {
    /// Where it is reached, by what is written at `place`.
    pub(super) fn reached(&mut self, place: Place) -> Result<Reached, ConfigError> {
        Reached::new(self.endpoints.take(), self.profiles.take(), place)
    }

    pub(super) fn meaning(
        self,
        name: &Name,
        endpoints: Vec<Endpoint>,
        place: &Place,
        warnings: &mut Vec<Warning>,
    ) -> Result<Upstream, ConfigError> {
        let balance = self.balance.map_or_else(Balance::default, |balance| balance.0);
        let by_order = matches!(balance, Balance::Failover | Balance::FailoverSticky);
        if by_order && endpoints.iter().any(|e| e.weight > NonZeroU16::MIN) {
            warnings.push(Warning::new(
                place.clone(),
                Problem::new(
                    format!("{balance} takes no notice of weights"),
                    "write balance: round_robin",
                ),
            ));
        }
        let connect = Connect::default();
        let connect = Connect {
            timeout: self.connect.timeout.map_or(connect.timeout, |time| time.0.0),
            attempts: self.connect.attempts.map_or(connect.attempts, |count| count.0.0),
            hold: self.connect.hold.map_or(connect.hold, |time| time.0.0),
        };
        Ok(Upstream {
            name: name.shared(),
            endpoints,
            balance,
            connect,
            dns: self.dns.meaning(place)?,
            health: self.health.and_then(|OrNone(health)| health?.meaning()),
            eject: match self.eject {
                None => Some(Eject::default()),
                Some(OrNone(eject)) => eject.map(EjectText::meaning),
            },
            on_unhealthy: self.on_unhealthy.map_or_else(OnUnhealthy::default, |it| it.0),
        })
    }
}

impl HealthText {
    fn meaning(self) -> Option<Health> {
        let default = Health::of(self.check.0?);
        Some(Health {
            interval: self.interval.map_or(default.interval, |time| time.0.0),
            timeout: self.timeout.map_or(default.timeout, |time| time.0.0),
            fall: self.fall.map_or(default.fall, |count| count.0.0),
            rise: self.rise.map_or(default.rise, |count| count.0.0),
            slow_start: self.slow_start.map_or(default.slow_start, |time| time.0.0),
            ask: default.ask,
        })
    }
}

impl EjectText {
    fn meaning(self) -> Eject {
        let default = Eject::default();
        let failures = self.consecutive_failures;
        Eject {
            consecutive_failures: failures.map_or(default.consecutive_failures, |it| it.0.0),
            lasting: self.lasting.map_or(default.lasting, |time| time.0.0),
            max_percent: self.max_percent.map_or(default.max_percent, |Text(Count(percent))| {
                u8::try_from(percent.get()).unwrap_or(100)
            }),
        }
    }
}

impl DnsText {
    fn meaning(self, upstream: &Place) -> Result<Dns, ConfigError> {
        let default = Dns::default();
        let dns = Dns {
            min_ttl: self.min_ttl.map_or(default.min_ttl, |time| time.0.0),
            max_ttl: self.max_ttl.map_or(default.max_ttl, |time| time.0.0),
            stale: self.stale.unwrap_or(default.stale),
        };
        if dns.min_ttl > dns.max_ttl {
            return Err(Problem::new(
                format!(
                    "min_ttl {} is above max_ttl {}",
                    humantime::format_duration(dns.min_ttl),
                    humantime::format_duration(dns.max_ttl)
                ),
                "raise max_ttl or lower min_ttl",
            )
            .at(&upstream.key("dns")));
        }
        Ok(dns)
    }
}

//! `ambassador check` and `ambassador schema`: what a configuration means, and what it can say.

use std::fmt::{self, Display};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cli::ConfigArgs;
use crate::config::{
    self, Acceleration, Admin, Balance, Clients, Config, Connect, Control, Dns, Drain, Eject,
    Endpoint, Environment, Health, Listen, OnUnhealthy, Policy, Profile, Resolved, Route,
    TierLimit, Upstream,
};

/// Prints what the configuration means, with `file` in place of that of the flags if it is given.
pub fn check(file: Option<PathBuf>, mut args: ConfigArgs) -> Result<()> {
    args.config = file.or(args.config);
    let resolved = args.resolve(&Environment::of_process())?;
    write!(std::io::stdout(), "{}", Meaning(&resolved)).context("print the configuration")
}

/// Prints the JSON Schema of the configuration file.
pub fn schema() -> Result<()> {
    writeln!(std::io::stdout(), "{:#}", config::schema().as_value()).context("print the schema")
}

/// What a configuration means, for people: every setting in force, and who said so.
struct Meaning<'r>(&'r Resolved);

/// A line of the report: a name, its value, and where that comes from.
struct Row {
    name: String,
    value: String,
    origin: String,
}

impl Display for Meaning<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Resolved { config, warnings, origins, .. } = self.0;
        let mut rows = settings(config);
        for row in &mut rows {
            row.origin = origins.get(&row.name).map_or("default".into(), |by| format!("from {by}"));
        }
        if let Some(Profile { name, evidence }) = &config.profile {
            rows.push(Row::new("environment", name, evidence));
        }
        for route in &config.routes {
            let by = origins.get(&format!("routes.{}", route.name)).map_or("", String::as_str);
            rows.push(Row::new("", "", ""));
            rows.push(Row::new("route", &route.name, format!("from {by}")));
            rows.extend(route_rows(route, config.acceleration.tier));
        }
        let names = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        let values = rows.iter().map(|row| row.value.chars().count()).max().unwrap_or(0).min(60);
        for Row { name, value, origin } in &rows {
            let line = format!("{name:names$}  {value:values$}  {origin}");
            writeln!(f, "{}", line.trim_end())?;
        }
        for (index, warning) in warnings.iter().enumerate() {
            if index == 0 {
                writeln!(f)?;
            }
            writeln!(f, "warning: {warning}")?;
        }
        Ok(())
    }
}

impl Row {
    fn new(name: impl Display, value: impl Display, origin: impl Display) -> Self {
        Self { name: name.to_string(), value: value.to_string(), origin: origin.to_string() }
    }

    /// A setting that comes from where its route comes from, unless it is a default.
    fn setting<T: PartialEq>(
        name: &str,
        set: &T,
        default: &T,
        show: impl Fn(&T) -> String,
    ) -> Self {
        Self::new(format!("  {name}"), show(set), if set == default { "default" } else { "" })
    }
}

fn settings(config: &Config) -> Vec<Row> {
    let Config { admin, acceleration, drain, profile: _, routes: _ } = config;
    let Admin { http, control, ready_when } = admin;
    let Drain { grace, deadline } = drain;
    let http = http.map_or("off".to_owned(), |address| address.to_string());
    let control = match control {
        Control::At(path) => format!("unix:{}", path.display()),
        Control::IfPossible(path) => format!("unix:{}, if possible", path.display()),
        Control::Off => "off".to_owned(),
    };
    let Acceleration { tier, require, cgroup, instance, stale_after, inflight } = acceleration;
    let require = require.map_or("none".to_owned(), |tier| tier.to_string());
    let instance = instance.as_deref().unwrap_or("derived from the network namespace");
    vec![
        Row::new("admin.http", http, ""),
        Row::new("admin.control", control, ""),
        Row::new("admin.ready_when", ready_when, ""),
        Row::new("acceleration.tier", tier, ""),
        Row::new("acceleration.require", require, ""),
        Row::new("acceleration.cgroup", cgroup, ""),
        Row::new("acceleration.instance", instance, ""),
        Row::new("acceleration.stale_after", stale_after.as_ref().map_or("never".into(), time), ""),
        Row::new("acceleration.inflight_bytes", inflight.bytes, ""),
        Row::new("acceleration.inflight_messages", inflight.messages, ""),
        Row::new("drain.grace", time(grace), ""),
        Row::new("drain.deadline", time(deadline), ""),
    ]
}

fn route_rows(route: &Route, tier: TierLimit) -> Vec<Row> {
    let Route { name: _, listen, socket_mode, upstream, max_connections, idle_timeout, .. } = route;
    let Upstream { name, endpoints, balance, connect, dns, health, eject, on_unhealthy } =
        &**upstream;
    let default = Policy::default();
    let mut rows = Vec::new();
    for listen in listen {
        let when = match listen {
            Listen::Tcp { if_available: true, .. } => ", if available",
            _ => "",
        };
        rows.push(Row::new("  listen", format!("{listen}{when}"), ""));
    }
    if listen.iter().any(|listen| matches!(listen, Listen::Unix(_))) {
        let octal = |mode: &u32| format!("{mode:04o}");
        rows.push(Row::setting("socket_mode", socket_mode, &default.socket_mode, octal));
    }
    let number = |number: &_| format!("{number}");
    let limit = |limit: &Option<_>| limit.map_or("none".to_owned(), |it| number(&it));
    rows.extend([
        Row::setting("max_connections", max_connections, &default.max_connections, number),
        Row::setting("max_pending", &route.max_pending, &default.max_pending, limit),
        Row::setting(
            "per_endpoint.max_connections",
            &route.per_endpoint.connections,
            &default.per_endpoint.connections,
            limit,
        ),
        Row::setting(
            "per_endpoint.max_pending",
            &route.per_endpoint.pending,
            &default.per_endpoint.pending,
            limit,
        ),
        Row::setting("idle_timeout", idle_timeout, &default.idle_timeout, |idle| {
            idle.as_ref().map_or("none".to_owned(), time)
        }),
        Row::setting("tier", &route.tier, &tier, TierLimit::to_string),
        Row::setting("clients", &route.clients, &default.clients, Clients::to_string),
        Row::new("  upstream", name, ""),
    ]);
    for Endpoint { target, weight } in endpoints {
        let weight = match (balance, weight.get()) {
            (Balance::Failover | Balance::FailoverSticky, _) | (_, 1) => String::new(),
            (_, weight) => format!(", weight {weight}"),
        };
        rows.push(Row::new("  endpoint", format!("{target}{weight}"), ""));
    }
    let (Connect { timeout, attempts, hold }, Dns { min_ttl, max_ttl, stale }) = (connect, dns);
    let (connect, dns) = (Connect::default(), Dns::default());
    rows.extend([
        Row::setting("balance", balance, &Balance::default(), Balance::to_string),
        Row::setting("connect.timeout", timeout, &connect.timeout, time),
        Row::setting("connect.attempts", attempts, &connect.attempts, number),
        Row::setting("connect.hold", hold, &connect.hold, time),
        Row::setting("dns.min_ttl", min_ttl, &dns.min_ttl, time),
        Row::setting("dns.max_ttl", max_ttl, &dns.max_ttl, time),
        Row::setting("dns.stale", stale, &dns.stale, bool::to_string),
    ]);
    match health {
        None => rows.push(Row::new("  health", "none", "")),
        Some(Health { ask, interval, timeout, fall, rise, slow_start }) => {
            let default = Health::of(ask.clone());
            rows.extend([
                Row::new("  health.check", ask, ""),
                Row::setting("health.interval", interval, &default.interval, time),
                Row::setting("health.timeout", timeout, &default.timeout, time),
                Row::setting("health.fall", fall, &default.fall, number),
                Row::setting("health.rise", rise, &default.rise, number),
                Row::setting("health.slow_start", slow_start, &default.slow_start, time),
            ]);
        }
    }
    let default = Eject::default();
    match eject {
        None => rows.push(Row::new("  eject", "none", "")),
        Some(Eject { consecutive_failures: failures, lasting, max_percent: percent }) => {
            rows.extend([
                Row::setting(
                    "eject.consecutive_failures",
                    failures,
                    &default.consecutive_failures,
                    number,
                ),
                Row::setting("eject.for", lasting, &default.lasting, time),
                Row::setting("eject.max_percent", percent, &default.max_percent, u8::to_string),
            ]);
        }
    }
    let default = OnUnhealthy::default();
    rows.push(Row::setting("on_unhealthy", on_unhealthy, &default, OnUnhealthy::to_string));
    rows
}

fn time(time: &Duration) -> String {
    humantime::format_duration(*time).to_string()
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::path::Path;

    use serde_json::Value;

    use super::*;
    use crate::config::{Cgroup, InFlight};

    const EXAMPLE: &str = include_str!("config/example.yaml");

    #[test]
    fn the_meaning_lists_every_setting_and_who_said_it() {
        let text = "version: 1
drain: { grace: 3s }
routes: [{ listen: [80, 'unix:/run/a.sock'], upstream: a, idle_timeout: 5s }]
upstreams: { a: { endpoints: ['a:1:2', 'b:1'], balance: round_robin } }";
        let resolved = Resolved::of_text(Path::new("c.yaml"), text.to_owned()).unwrap();
        let expected = "\
admin.http                      0.0.0.0:9090                                    default
admin.control                   unix:/run/ambassador/control.sock, if possible  default
admin.ready_when                bound                                           default
acceleration.tier               auto                                            default
acceleration.require            none                                            default
acceleration.cgroup             auto                                            default
acceleration.instance           derived from the network namespace              default
acceleration.stale_after        10m                                             default
acceleration.inflight_bytes     1048576                                         default
acceleration.inflight_messages  2048                                            default
drain.grace                     3s                                              from c.yaml
drain.deadline                  25s                                             default

route                           a                                               from c.yaml
  listen                        127.0.0.1:80
  listen                        [::1]:80, if available
  listen                        unix:/run/a.sock
  socket_mode                   0666                                            default
  max_connections               10000                                           default
  max_pending                   none                                            default
  per_endpoint.max_connections  none                                            default
  per_endpoint.max_pending      none                                            default
  idle_timeout                  5s
  tier                          auto                                            default
  clients                       any                                             default
  upstream                      a
  endpoint                      a:1, weight 2
  endpoint                      b:1
  balance                       round_robin
  connect.timeout               2s                                              default
  connect.attempts              3                                               default
  connect.hold                  0s                                              default
  dns.min_ttl                   1s                                              default
  dns.max_ttl                   30s                                             default
  dns.stale                     true                                            default
  health                        none
  eject.consecutive_failures    5                                               default
  eject.for                     5s                                              default
  eject.max_percent             50                                              default
  on_unhealthy                  keep                                            default
";
        assert_eq!(Meaning(&resolved).to_string(), expected);
    }

    /// The paths of all keys of a file, without the names of upstreams.
    fn keys_of_file(value: &Value, path: &str, keys: &mut Vec<String>) {
        match value {
            Value::Object(object) => {
                for (key, value) in object {
                    let path = match path {
                        "/upstreams" | "/upstreams/*/profiles" => format!("{path}/*"),
                        path => format!("{path}/{key}"),
                    };
                    keys.push(path.clone());
                    keys_of_file(value, &path, keys);
                }
            }
            Value::Array(list) => list.iter().for_each(|value| keys_of_file(value, path, keys)),
            _ => {}
        }
    }

    /// The paths of all keys that a schema describes.
    fn keys_of_schema(root: &Value, schema: &Value, path: &str, keys: &mut Vec<String>) {
        if let Some(reference) = schema["$ref"].as_str() {
            let definition = root.pointer(reference.trim_start_matches('#')).expect(reference);
            keys_of_schema(root, definition, path, keys);
        }
        for (key, schema) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}/{key}");
            keys.push(path.clone());
            keys_of_schema(root, schema, &path, keys);
        }
        for (_, schema) in schema["patternProperties"].as_object().into_iter().flatten() {
            let path = format!("{path}/*");
            keys.push(path.clone());
            keys_of_schema(root, schema, &path, keys);
        }
        for schema in schema["anyOf"].as_array().into_iter().flatten() {
            keys_of_schema(root, schema, path, keys);
        }
        keys_of_schema_if_any(root, &schema["items"], path, keys);
    }

    fn keys_of_schema_if_any(root: &Value, schema: &Value, path: &str, keys: &mut Vec<String>) {
        if schema.is_object() {
            keys_of_schema(root, schema, path, keys);
        }
    }

    #[test]
    fn the_schema_describes_exactly_the_keys_of_the_example() {
        let schema = config::schema().to_value();
        assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
        let mut described = Vec::new();
        keys_of_schema(&schema, &schema, "", &mut described);

        let example: Value = serde_saphyr::from_str(EXAMPLE).unwrap();
        let mut written = Vec::new();
        keys_of_file(&example, "", &mut written);
        assert!(written.len() > 25, "{written:?}");

        described.sort();
        written.sort();
        written.dedup();
        assert_eq!(described, written);
    }

    #[test]
    fn the_example_says_what_it_seems_to() {
        let resolved = Resolved::of_text(Path::new("example.yaml"), EXAMPLE.to_owned()).unwrap();
        assert_eq!(resolved.warnings, []);
        let route = &resolved.config.routes[0];
        assert_eq!((route.listen.len(), route.socket_mode), (3, 0o660));
        let acceleration = Acceleration {
            cgroup: Cgroup::At("/sys/fs/cgroup/pod".into()),
            instance: Some("orders-7f9c".into()),
            stale_after: Some(Duration::from_secs(30)),
            inflight: InFlight {
                bytes: const { NonZeroU32::new(524_288).unwrap() },
                messages: const { NonZeroU32::new(512).unwrap() },
            },
            ..Acceleration::default()
        };
        assert_eq!(resolved.config.acceleration, acceleration);
        assert_eq!(route.clients, Clients::NonBlocking);
    }
}

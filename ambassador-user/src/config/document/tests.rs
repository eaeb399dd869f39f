//! What files are read as, and how slips in them are told.

use proptest::prelude::*;
use proptest::{collection, option};
use serde_json::{Value, json};

use super::*;

const EXAMPLE: &str = include_str!("../example.yaml");
const TOML: &str = r#"version = 1
[[routes]]
listen = [5432, "unix:/run/db.sock"]
upstream = "db"
[upstreams.db]
endpoints = "db:5432"
connect = { timeout = "2s", attempts = 3 }
"#;

fn yaml(text: impl Into<String>) -> Result<Resolved, String> {
    Resolved::of_text(Path::new("c.yaml"), text.into()).map_err(|error| error.to_string())
}

fn toml(text: impl Into<String>) -> Result<Resolved, String> {
    Resolved::of_text(Path::new("c.toml"), text.into()).map_err(|error| error.to_string())
}

/// `original` with one thing changed.
fn with(original: &str, old: &str, new: &str) -> String {
    assert!(original.contains(old), "{old} is not in the original");
    original.replacen(old, new, 1)
}

#[test]
fn yaml_and_toml_say_the_same() {
    let said_in_yaml = "version: 1
routes:
  - listen: [5432, 'unix:/run/db.sock']
    upstream: db
upstreams:
  db: { endpoints: db:5432, connect: { timeout: 2s, attempts: 3 } }";
    assert_eq!(yaml(said_in_yaml).unwrap().config, toml(TOML).unwrap().config);
}

#[test]
fn a_list_of_one_needs_no_brackets_and_a_port_no_quotes() {
    let text =
        "{version: 1, routes: [{listen: 5432, upstream: a}], upstreams: {a: {endpoints: a:1}}}";
    assert_eq!(yaml(text).unwrap().config.routes[0].listen.len(), 2);
}

#[test]
fn a_slip_in_yaml_is_one_line_with_file_line_column_place_problem_and_fix() {
    let wrong_unix = format!("\"unix:/{}\"", "x".repeat(107));
    for (old, new, expected) in [
        (
            "max_connections",
            "max_conections",
            "c.yaml:21:5: routes[0].max_conections: unknown key \"max_conections\", did you mean \"max_connections\"?",
        ),
        (
            "version: 1",
            "version: 1\nfoo: 1",
            "c.yaml:3:1: foo: unknown key \"foo\"; write one of version, environment, admin, acceleration, drain, routes, upstreams",
        ),
        (
            "balance: failover",
            "health: {}",
            "c.yaml:33:13: upstreams.orders-db.health: the key \"check\" is missing; add check",
        ),
        (
            "balance: failover",
            "balance: source_hsh",
            "c.yaml:33:14: upstreams.orders-db.balance: \"source_hsh\" is not a balance, did you mean \"source_hash\"?",
        ),
        (
            "protocol: tcp",
            "protocol: redis",
            "c.yaml:20:15: routes[0].protocol: protocol redis is not in this release; write tcp",
        ),
        ("version: 1\n", "", "c.yaml: the key \"version\" is missing; write version: 1"),
        (
            "version: 1",
            "version: 2",
            "c.yaml:2:10: version: version 2 is not known to this release; write version: 1",
        ),
        (
            "    upstream: orders-db\n",
            "",
            "c.yaml:17:5: routes[0]: the key \"upstream\" is missing; add upstream",
        ),
        (
            "upstream: orders-db",
            "upstream: order-db",
            "c.yaml:19:5: routes[0].upstream: there is no upstream \"order-db\", did you mean \"orders-db\"?",
        ),
        (
            "max_connections: 1000",
            "max_connections: 0",
            "c.yaml:21:22: routes[0].max_connections: \"0\" is out of bounds; write 1 to 1000000",
        ),
        (
            "attempts: 3",
            "attempts: many",
            "c.yaml:34:39: upstreams.orders-db.connect.attempts: \"many\" is not a whole number; write 1 to 100",
        ),
        (
            "cgroup: /sys/fs/cgroup/pod",
            "cgroup: kubepods/pod1",
            "c.yaml:10:11: acceleration.cgroup: \"kubepods/pod1\" is not an absolute path; write the pod's cgroup from the root, such as /sys/fs/cgroup/pod, or auto",
        ),
        (
            "instance: orders-7f9c",
            "instance: ../other",
            "c.yaml:11:13: acceleration.instance: \"../other\" does not name an instance; write letters, digits, _ and -, at most 64 in all",
        ),
        (
            "stale_after: 30s",
            "stale_after: 5s",
            "c.yaml:12:16: acceleration.stale_after: \"5s\" is too short; write 10s to 1day, or 0s for never",
        ),
        (
            "inflight_bytes: 524288",
            "inflight_bytes: 1024",
            "c.yaml:13:19: acceleration.inflight_bytes: \"1024\" is out of bounds; write 65536 to 16777216",
        ),
        (
            "inflight_messages: 512",
            "inflight_messages: 2 k",
            "c.yaml:14:22: acceleration.inflight_messages: \"2 k\" is not a whole number; write 16 to 65536",
        ),
        (
            "clients: nonblocking",
            "clients: non-blocking",
            "c.yaml:26:14: routes[0].clients: \"non-blocking\" is not a kind of clients, did you mean \"nonblocking\"?",
        ),
        (
            "idle_timeout: 0s",
            "idle_timeout: 5",
            "c.yaml:24:19: routes[0].idle_timeout: \"5\" is not a duration; write a number with its unit, such as 500ms, 2s or 5m, 0s to 1day",
        ),
        (
            "timeout: 2s",
            "timeout: 6m",
            "c.yaml:34:25: upstreams.orders-db.connect.timeout: \"6m\" is out of bounds; write 1ms to 5m",
        ),
        (
            "0660",
            "0990",
            "c.yaml:27:18: routes[0].socket_mode: \"0990\" is not a file mode; write three octal digits after a 0, in quotes, such as \"0660\"",
        ),
        (
            "[::1]:5432",
            "[::1]:0",
            "c.yaml:18:32: routes[0].listen[1]: port 0 would be a different port at every start; write the port that clients use, 1 to 65535",
        ),
        ("\"unix:/var/run/db/postgres.sock\"", &wrong_unix, "at most 107 bytes"),
        (
            "db-0.prod.svc:5432",
            "db-0.prod.svc",
            "c.yaml:32:17: upstreams.orders-db.endpoints[0]: \"db-0.prod.svc\" has no port; add :PORT, such as db:5432",
        ),
        ("db-0.prod.svc:5432", "db-0.prod.svc:5432:0", "\"0\" is not a weight; write 1 to 1000"),
        (
            "db-1.prod.svc:5432",
            "localhost:5432",
            "c.yaml:17:5: routes[0]: the route leads to itself; write the address of the real service as its endpoint",
        ),
        (
            "max_ttl: 30s",
            "max_ttl: 10ms",
            "upstreams.orders-db.dns: min_ttl 1s is above max_ttl 10ms; raise max_ttl or lower min_ttl",
        ),
        (
            "grace: 0s",
            "grace: 1m",
            "drain.grace: grace 1m ends after deadline 25s; raise the deadline or shorten the grace",
        ),
        (
            "tier: auto\n  require: none",
            "tier: copy\n  require: splice",
            "acceleration.require: tier splice is required, and only copy and below is allowed; require copy or lower, or allow splice",
        ),
        (
            "require: none",
            "require: sockmap",
            "routes[0].tier: tier sockmap is required, and this route allows only splice; allow sockmap here, or lower acceleration.require",
        ),
        ("stale: true", "stale: yes", "this is neither true nor false; write one of them"),
        (
            "http: 0.0.0.0:9090",
            "http: 9090",
            "c.yaml:4:9: admin.http: 9090 does not say which address; write 0.0.0.0:9090 for probes of the kubelet, or 127.0.0.1:9090",
        ),
        ("ready_when: healthy", "ready_when: up", "c.yaml:6:15: admin.ready_when: \"up\" is not"),
        (
            "version: 1",
            "version: 1\nversion: 1",
            "c.yaml:3:1: the key \"version\" is written twice; keep one",
        ),
        ("  orders-db:", "  1db:", "\"1db\" is not a name; write a letter"),
        ("default: dev }", "default: dev", "is not usable YAML"),
        (
            "eject: { consecutive_failures: 5, for: 5s, max_percent: 50 }",
            "eject: off",
            "c.yaml:43:5: upstreams.orders-db.eject: string \"off\" does not belong here; write a mapping, or none",
        ),
    ] {
        let error = yaml(with(EXAMPLE, old, new)).expect_err(new);
        assert!(error.contains(expected), "{new}\n     got {error}\nexpected {expected}");
        assert!(error.starts_with("c.yaml:") && !error.contains('\n'), "{error}");
    }
}

#[test]
fn a_slip_in_toml_is_told_as_in_yaml() {
    for (old, new, expected) in [
        (
            "listen",
            "listn",
            "c.toml:3:1: routes[0].listn: unknown key \"listn\", did you mean \"listen\"?",
        ),
        (
            "\"2s\"",
            "2",
            "c.toml:7:23: upstreams.db.connect.timeout: integer `2` does not belong here; write a duration with its unit, such as 500ms, 2s or 5m",
        ),
        (
            "5432,",
            "0,",
            "c.toml:3:11: routes[0].listen[0]: port 0 would be a different port at every start",
        ),
        ("version = 1", "", "c.toml:1:1: the key \"version\" is missing; write version: 1"),
        ("version = 1", "version = 1\nversion = 1", "c.toml:2:1: is not TOML: duplicate key"),
        (
            "upstream = \"db\"",
            "upstream = \"bd\"",
            "c.toml:4:12: routes[0].upstream: there is no upstream \"bd\", did you mean \"db\"?",
        ),
    ] {
        let error = toml(with(TOML, old, new)).expect_err(new);
        assert!(error.contains(expected), "{new}\n     got {error}\nexpected {expected}");
    }
}

#[test]
fn a_file_without_content_is_told_from_one_with_wrong_content() {
    for text in ["", "# nothing\n", "\n\n"] {
        assert!(yaml(text).unwrap_err().contains("the file is empty; write version: 1"), "{text}");
    }
    assert!(yaml("- a").unwrap_err().contains("a mapping belongs here"));
    assert!(yaml("version: 1\n\0").unwrap_err().contains("c.yaml:2:1: is not usable YAML"));
    assert!(yaml("version: 1").unwrap_err().contains("--route 5432=orders-db.prod.svc:5432"));
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let read = |path: &Path| Document::read(path).err().unwrap().to_string();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.yaml");
    let name = path.display();
    assert!(read(&path).starts_with(&format!("{name}: cannot be read: No such file")));
    std::fs::write(&path, b"version: 1\n# \xff").unwrap();
    assert_eq!(read(&path), format!("{name}:2:3: is not UTF-8 text; save the file as UTF-8"));
    std::fs::write(&path, vec![b'#'; 1 + (1 << 20)]).unwrap();
    assert_eq!(read(&path), format!("{name}: is larger than 1 MiB; write a smaller file"));
}

#[test]
fn hostile_nesting_and_aliases_are_refused() {
    assert!(yaml("[".repeat(100_000)).is_err());
    assert!(yaml("a: &a [*a, *a]").is_err());
    let mut bomb = String::from("a0: &a0 [x]\n");
    for level in 1..30 {
        let below = level - 1;
        bomb.push_str(&format!("a{level}: &a{level} [*a{below}, *a{below}, *a{below}]\n"));
    }
    assert!(yaml(bomb).is_err());
    assert!(toml("[".repeat(100_000)).is_err());
    assert!(toml(format!("a = {}", "[".repeat(100_000))).is_err());
}

/// A file that is right, as JSON, which is YAML too: every key may be there or not.
fn any_file() -> impl Strategy<Value = Value> {
    let tier = || option::of(prop_oneof!["auto", "direct", "sockmap", "splice", "copy"]);
    let seconds =
        |range: std::ops::RangeInclusive<u32>| option::of(range.prop_map(|n| format!("{n}s")));
    let weight = option::of(1..=1000_u16);
    let endpoint = ("[a-z][a-z0-9-]{0,20}[a-z0-9](\\.[a-z]{1,9}){0,3}", 1..9000_u16, weight);
    let endpoint = endpoint.prop_map(|(host, port, weight)| match weight {
        Some(weight) => format!("{host}:{port}:{weight}"),
        None => format!("{host}:{port}"),
    });
    let upstream = (
        collection::vec(endpoint, 1..5),
        option::of("failover(_sticky)?|round_robin|least_connections|random_two|source_hash"),
        (seconds(1..=300), option::of(1..=100_u32)),
        (seconds(1..=10), seconds(30..=3600), option::of(any::<bool>())),
    )
        .prop_map(|(endpoints, balance, (timeout, attempts), (min_ttl, max_ttl, stale))| {
            json!({
                "endpoints": endpoints,
                "balance": balance,
                "connect": { "timeout": timeout, "attempts": attempts },
                "dns": { "min_ttl": min_ttl, "max_ttl": max_ttl, "stale": stale },
            })
        });
    let route = (0..3_u8, tier(), option::of(1..=1_000_000_u32), seconds(0..=86_400));
    let routes = collection::vec((route, upstream), 1..6);
    (routes, tier(), seconds(0..=25), seconds(25..=3600)).prop_map(
        |(routes, tier, grace, deadline)| {
            let (mut listed, mut upstreams) = (Vec::new(), serde_json::Map::new());
            for (n, ((form, tier, max_connections, idle_timeout), upstream)) in
                routes.into_iter().enumerate()
            {
                let port = 10_000 + n;
                let listen = match form {
                    0 => json!(port),
                    1 => json!(format!("unix:/run/{n}.sock")),
                    _ => json!([format!("0.0.0.0:{port}"), format!("[::1]:{port}")]),
                };
                let upstream_name = format!("u{n}");
                listed.push(json!({
                    "listen": listen,
                    "upstream": upstream_name,
                    "tier": tier,
                    "max_connections": max_connections,
                    "idle_timeout": idle_timeout,
                }));
                upstreams.insert(upstream_name, upstream);
            }
            json!({
                "version": 1,
                "acceleration": { "tier": tier },
                "drain": { "grace": grace, "deadline": deadline },
                "routes": listed,
                "upstreams": upstreams,
            })
        },
    )
}

proptest! {
    #[test]
    fn every_right_file_is_read_and_means_what_it_says(file in any_file()) {
        let Resolved { config, .. } = yaml(file.to_string()).map_err(TestCaseError::fail)?;
        let routes = file["routes"].as_array().unwrap();
        prop_assert_eq!(config.routes.len(), routes.len());
        for (route, written) in config.routes.iter().zip(routes) {
            let upstream = &file["upstreams"][written["upstream"].as_str().unwrap()];
            let endpoints = upstream["endpoints"].as_array().unwrap();
            prop_assert_eq!(route.upstream.endpoints.len(), endpoints.len());
            if let Some(attempts) = upstream["connect"]["attempts"].as_u64() {
                prop_assert_eq!(u64::from(route.upstream.connect.attempts.get()), attempts);
            }
            if let Some(most) = written["max_connections"].as_u64() {
                prop_assert_eq!(u64::from(route.max_connections.get()), most);
            }
        }
    }

    #[test]
    fn any_text_is_read_or_refused_in_one_line(text in any::<String>()) {
        for error in [yaml(text.clone()).err(), toml(text).err()].into_iter().flatten() {
            prop_assert!(!error.chars().any(char::is_control), "{error:?}");
        }
    }

    #[test]
    fn one_changed_byte_is_read_or_refused_in_one_line(
        at in 0..EXAMPLE.len(),
        new in any::<u8>(),
    ) {
        let mut bytes = EXAMPLE.as_bytes().to_vec();
        bytes[at] = new;
        if let Err(error) = yaml(String::from_utf8_lossy(&bytes)) {
            prop_assert!(!error.chars().any(char::is_control), "{error:?}");
            prop_assert!(error.len() < 500, "{error}");
        }
    }
}

#[test]
fn every_misspelt_key_is_refused_by_name() {
    let keys = "
        version admin http control acceleration tier require cgroup instance stale_after
        inflight_bytes inflight_messages drain grace deadline routes name listen upstream
        protocol max_connections idle_timeout clients socket_mode upstreams endpoints
        balance connect timeout attempts dns min_ttl max_ttl stale environment from default profiles
    ";
    for key in keys.split_whitespace() {
        let (at, _) = EXAMPLE
            .match_indices(&format!("{key}:"))
            .find(|(at, _)| EXAMPLE[..*at].ends_with([' ', '\n']))
            .expect(key);
        let text = format!("{}x{}", &EXAMPLE[..at], &EXAMPLE[at..]);
        let error = yaml(text).unwrap_err();
        assert!(error.contains(&format!("unknown key \"x{key}\"")), "{error}");
    }
}

//! What variables mean, and how slips in them are told.

use super::*;
use crate::config::{Acceleration, Cgroup, Listen, Resolved, resolve};

fn load(variables: &[(&str, &str)]) -> Result<Resolved, String> {
    let environment: Environment = variables.iter().copied().collect();
    environment.layer().and_then(|layer| resolve(vec![layer])).map_err(|error| error.to_string())
}

/// Each route as `NAME LISTEN,...=TARGET*WEIGHT,... BALANCE`.
fn routes(variables: &[(&str, &str)]) -> Vec<String> {
    let join = |parts: Vec<String>| parts.join(",");
    let resolved = load(variables).unwrap();
    let routes = resolved.config.routes.iter().map(|route| {
        let listen = route.listen.iter().map(Listen::to_string).collect();
        let endpoints = route.upstream.endpoints.iter();
        let endpoints = endpoints.map(|e| format!("{}*{}", e.target, e.weight)).collect();
        let balance = route.upstream.balance;
        format!("{} {}={} {balance}", route.name, join(listen), join(endpoints))
    });
    routes.collect()
}

#[test]
fn numbered_routes_are_taken_in_the_order_of_their_numbers() {
    let routes = routes(&[
        ("AMBASSADOR_ROUTE_10", "c:unix:/c=c:1"),
        ("AMBASSADOR_ROUTE_2", "b:unix:/b=b:1"),
        ("AMBASSADOR_ROUTE_0", "a:unix:/a=a:1"),
        ("AMBASSADOR_ROUTE_3", ""),
        ("AMBASSADOR_ROUTE_PORT_80_TCP", "tcp://10.0.0.1:80"),
    ]);
    let expected = ["a unix:/a=a:1*1", "b unix:/b=b:1*1", "c unix:/c=c:1*1"];
    assert_eq!(routes, expected.map(|route| format!("{route} failover")));
}

#[test]
fn the_variables_of_replaced_images_work_verbatim() {
    for (variables, expected) in [
        (
            &[("REDIS_SERVERS", "redis-0:6379:1 redis-1:6379:3")][..],
            "redis 127.0.0.1:6380,[::1]:6380=redis-0:6379*1,redis-1:6379*3 round_robin",
        ),
        (
            &[("REDIS_SERVERS", "redis:6379:1"), ("LISTEN_PORT", "7000")],
            "redis 127.0.0.1:7000,[::1]:7000=redis:6379*1 round_robin",
        ),
        (
            &[("UPSTREAM_REDIS_HOSTS", "a:6380,b")],
            "redis 127.0.0.1:6379,[::1]:6379=a:6380*1,b:6379*1 failover",
        ),
        (
            &[("LISTEN_PORT", "5432"), ("UPSTREAM_HOST", "db.prod")],
            "db 127.0.0.1:5432,[::1]:5432=db.prod:5432*1 failover",
        ),
        (
            &[("LISTEN_PORT", "5432"), ("UPSTREAM_HOST", "db:6000")],
            "db 127.0.0.1:5432,[::1]:5432=db:6000*1 failover",
        ),
        (
            &[("LISTEN_PORT", "80"), ("UPSTREAM_HOST", "fd00::1"), ("UPSTREAM_PORT", "81")],
            "port-80 127.0.0.1:80,[::1]:80=[fd00::1]:81*1 failover",
        ),
        (
            &[("LISTEN_SOCKET", "/run/mysqld/mysqld.sock"), ("UPSTREAM_HOST", "db")],
            "db unix:/run/mysqld/mysqld.sock=db:3306*1 failover",
        ),
        (
            &[("LISTEN_SOCKET", "unix:/run/.s.PGSQL.5433"), ("UPSTREAM_HOST", "db")],
            "db unix:/run/.s.PGSQL.5433=db:5433*1 failover",
        ),
        (
            &[("LISTEN_SOCKET", "/run/db.sock"), ("LISTEN_PORT", "1"), ("UPSTREAM_HOST", "db")],
            "db 127.0.0.1:1,[::1]:1,unix:/run/db.sock=db:1*1 failover",
        ),
    ] {
        assert_eq!(routes(variables), [expected], "{variables:?}");
    }
}

#[test]
fn a_bad_variable_is_refused_by_its_name() {
    for (variables, expected) in [
        (&[("AMBASSADOR_ROUTE_1", "5432=db")][..], "AMBASSADOR_ROUTE_1: \"db\" has no port"),
        (&[("REDIS_SERVERS", "a:1:0")], "REDIS_SERVERS: \"0\" is not a weight"),
        (&[("REDIS_SERVERS", " ")], "REDIS_SERVERS: names no host"),
        (&[("UPSTREAM_HOST", "db")], "UPSTREAM_HOST: \"db\" has no port"),
        (&[("UPSTREAM_HOST", "db:1")], "UPSTREAM_HOST: does not say where to listen"),
        (&[("LISTEN_SOCKET", "/run/a")], "LISTEN_SOCKET: leads nowhere"),
        (
            &[("LISTEN_SOCKET", "/run/a"), ("UPSTREAM_HOST", "db")],
            "UPSTREAM_HOST: \"db\" has no port; write HOST:PORT, or set UPSTREAM_PORT",
        ),
        (
            &[("LISTEN_PORT", "tcp://10.0.0.1:80"), ("REDIS_SERVERS", "a:1:1")],
            "LISTEN_PORT: \"tcp://10.0.0.1:80\" is not a port",
        ),
        (
            &[("REDIS_SERVERS", "a:1:1"), ("UPSTREAM_REDIS_HOSTS", "a")],
            "UPSTREAM_REDIS_HOSTS: the name redis is taken by REDIS_SERVERS",
        ),
        (&[("AMBASSADOR_CGROUP", "pod")], "AMBASSADOR_CGROUP: \"pod\" is not an absolute path"),
        (&[("AMBASSADOR_TIER", "fast")], "AMBASSADOR_TIER: \"fast\" is not a tier"),
    ] {
        let error = load(variables).unwrap_err();
        assert!(error.starts_with(expected), "{variables:?}: {error}");
    }
}

#[test]
fn every_variable_of_the_kernel_tiers_has_effect() {
    let resolved = load(&[
        ("AMBASSADOR_ROUTE_0", "1=a:1"),
        ("AMBASSADOR_CGROUP", "/sys/fs/cgroup/pod"),
        ("AMBASSADOR_INSTANCE", "orders-7f9c"),
        ("AMBASSADOR_STALE_AFTER", "10s"),
        ("AMBASSADOR_INFLIGHT_BYTES", "16777216"),
        ("AMBASSADOR_INFLIGHT_MESSAGES", "65536"),
    ]);
    let Resolved { config, origins, .. } = resolved.unwrap();
    let Acceleration { cgroup, instance, stale_after, inflight, .. } = config.acceleration;
    assert_eq!(cgroup, Cgroup::At("/sys/fs/cgroup/pod".into()));
    assert_eq!(instance.as_deref(), Some("orders-7f9c"));
    assert_eq!(stale_after.map(|time| time.as_secs()), Some(10));
    assert_eq!((inflight.bytes.get(), inflight.messages.get()), (1 << 24, 1 << 16));
    assert_eq!(origins["acceleration.inflight_messages"], "AMBASSADOR_INFLIGHT_MESSAGES");
    assert_eq!(origins.len(), 6);
}

#[cfg(unix)]
#[test]
fn a_variable_that_is_not_text_is_refused_only_if_it_is_ours() {
    use std::os::unix::ffi::OsStringExt;
    let bytes = || OsString::from_vec(vec![0xff]);
    let other: Environment = [("OTHER", bytes())].into_iter().collect();
    assert!(other.layer().is_ok());
    let ours: Environment = [("AMBASSADOR_TIER", bytes())].into_iter().collect();
    let error = ours.layer().unwrap_err().to_string();
    assert_eq!(error, "AMBASSADOR_TIER: is not UTF-8 text; write it as UTF-8");
}

#[test]
fn a_likely_slip_is_warned_of_and_a_service_of_our_name_is_not() {
    let resolved = load(&[
        ("AMBASSADOR_ROUTE_0", "1=a:1"),
        ("AMBASSADOR_TEIR", "copy"),
        ("AMBASSADOR_PORT", "tcp://10.0.0.1:80"),
        ("AMBASSADOR_SERVICE_HOST", "10.0.0.1"),
    ]);
    let warnings: Vec<String> = resolved.unwrap().warnings.iter().map(Warning::to_string).collect();
    assert_eq!(warnings, ["AMBASSADOR_TEIR: has no effect; write AMBASSADOR_TIER"]);
}

//! A second server for when the first one fails, as the ambassador and HAProxy are told of it: with the same checks,
//! as often, and all that makes either quick.

use std::net::SocketAddr;

use ambassador_tests::pool::Dialect;

use super::Order;

/// Takes over from the upstream of the order.
#[derive(Clone, Copy)]
pub(crate) struct Standby {
    /// Where it is.
    pub(crate) address: SocketAddr,
    /// What both of them speak.
    pub(crate) dialect: Dialect,
}

/// Of an upstream in the ambassador's file.
pub(super) fn ambassador(order: &Order, standby: Standby) -> String {
    let check = match standby.dialect {
        Dialect::Redis => "redis",
        Dialect::Postgres => "postgres",
    };
    format!(
        "endpoints: [\"{}\", \"{}\"], balance: failover, on_unhealthy: close, \
         connect: {{ timeout: 300ms }}, \
         health: {{ check: {check}, interval: 500ms, timeout: 300ms, fall: 2, rise: 2 }}",
        order.upstream, standby.address
    )
}

/// Of a `listen` section of HAProxy's file: one connect that fails is believed, connections to what is down are
/// ended, and what a check has found is asked again after a fifth of the interval.
pub(super) fn haproxy(order: &Order, standby: Standby) -> String {
    let check = match standby.dialect {
        Dialect::Redis => "redis-check",
        Dialect::Postgres => "pgsql-check user postgres",
    };
    format!(
        "    option {check}
    option redispatch 1
    retries 3
    retry-on conn-failure
    timeout connect 300ms
    timeout check 300ms
    default-server check inter 500ms fastinter 100ms downinter 500ms fall 2 rise 2
    default-server observe layer4 error-limit 1 on-error mark-down
    default-server on-marked-down shutdown-sessions
    server upstream {}
    server standby {} backup
",
        order.upstream, standby.address
    )
}

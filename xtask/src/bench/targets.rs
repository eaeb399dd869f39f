//! What was set out to be reached, each as a comparison within one run, and whether it was.

use ambassador::bench::table::Table;

use super::report::Report;

/// One thing that was wanted, in every load that it is about.
struct Target {
    /// In words.
    says: &'static str,
    /// Whose figure it is about.
    subject: &'static str,
    /// Which loads; one that gives no such figure is left out.
    loads: &'static [&'static str],
    /// Which figure.
    figure: &'static str,
    /// What that is divided by.
    over: Over,
    /// What must come out.
    bound: Bound,
}

/// What a figure is compared with.
#[derive(Clone, Copy)]
enum Over {
    /// Nothing: it stands for itself.
    Nothing,
    /// The same figure through another subject.
    Subject(&'static str),
    /// The same figure of another load through the same subject.
    Load(&'static str),
}

#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

const REQUESTS: &[&str] = &[
    "get",
    "get-pipelined",
    "select",
    "select-16",
    "round-trips",
    "round-trips-64",
    "round-trips-4k",
    "round-trips-4k-64",
];
const BULK: &[&str] = &["upload", "upload-8", "download", "download-8"];
const CONNECTIONS: &[&str] = &["connections"];
const STARTS: &[&str] = &["start", "start-100", "start-1000"];
const GROWTH: &[&str] = &["round-trips-1000", "round-trips-5000", "routes-100", "routes-1000"];
const RELOAD: &[&str] = &["reload"];
const CHECKS: &[&str] = &["checks"];
const FAILOVER: &[&str] = &[
    "redis-killed",
    "redis-stopped",
    "redis-unreachable",
    "redis-resetting",
    "postgres-killed",
    "postgres-stopped",
    "postgres-unreachable",
    "postgres-resetting",
];
const IDLE: &[&str] = &["idle", "idle-5000"];

const DIRECT: &str = "ambassador direct";
const SOCKMAP: &str = "ambassador sockmap";
const SPLICE: &str = "ambassador splice";
const COPY: &str = "ambassador copy";
const NO_PROXY: Over = Over::Subject("no proxy");
const HAPROXY: Over = Over::Subject("HAProxy");

#[rustfmt::skip]
const TARGETS: &[Target] = {
    use Bound::{AtLeast, AtMost};
    const fn target(
        says: &'static str,
        subject: &'static str,
        loads: &'static [&'static str],
        figure: &'static str,
        over: Over,
        bound: Bound,
    ) -> Target {
        Target { says, subject, loads, figure, over, bound }
    }
    &[
        target("`direct`: at least 0.97 × no proxy in requests", DIRECT, REQUESTS, "per second", NO_PROXY, AtLeast(0.97)),
        target("`direct`: at least 0.97 × no proxy in bulk", DIRECT, BULK, "GB/s", NO_PROXY, AtLeast(0.97)),
        target("`direct`: at least 0.90 × no proxy in new connections", DIRECT, CONNECTIONS, "per second", NO_PROXY, AtLeast(0.90)),
        target("`direct`: at most 1.05 × the CPU of no proxy in bulk", DIRECT, BULK, "CPU s/GB", NO_PROXY, AtMost(1.05)),
        target("`sockmap`: better than HAProxy in requests", SOCKMAP, REQUESTS, "per second", HAPROXY, AtLeast(1.0)),
        target("`sockmap`: better than HAProxy in bulk", SOCKMAP, BULK, "GB/s", HAPROXY, AtLeast(1.0)),
        target("`sockmap`: better than HAProxy in new connections", SOCKMAP, CONNECTIONS, "per second", HAPROXY, AtLeast(1.0)),
        target("`sockmap`: 1.3 × HAProxy in small requests", SOCKMAP, &["get"], "per second", HAPROXY, AtLeast(1.3)),
        target("`sockmap`: 1.5 × HAProxy in uploads", SOCKMAP, &["upload"], "GB/s", HAPROXY, AtLeast(1.5)),
        target("`sockmap`: at most 0.75 × the CPU of HAProxy in uploads", SOCKMAP, &["upload"], "CPU s/GB", HAPROXY, AtMost(0.75)),
        target("`splice`: at least 1.15 × HAProxy in requests", SPLICE, REQUESTS, "per second", HAPROXY, AtLeast(1.15)),
        target("`splice`: at least 1.15 × HAProxy in bulk", SPLICE, BULK, "GB/s", HAPROXY, AtLeast(1.15)),
        target("`splice`: at most 0.9 × the CPU of HAProxy itself in requests", SPLICE, REQUESTS, "proxy CPU s/10k", HAPROXY, AtMost(0.9)),
        target("`splice`: at most 0.9 × the CPU of HAProxy itself in bulk", SPLICE, BULK, "proxy CPU s/GB", HAPROXY, AtMost(0.9)),
        target("`splice`: p99 not above HAProxy's", SPLICE, REQUESTS, "p99 µs", HAPROXY, AtMost(1.0)),
        target("`splice`: never worse than `copy` in requests", SPLICE, REQUESTS, "per second", Over::Subject(COPY), AtLeast(1.0)),
        target("`splice`: never worse than `copy` in bulk", SPLICE, BULK, "GB/s", Over::Subject(COPY), AtLeast(1.0)),
        target("`direct`: started no slower than HAProxy", DIRECT, STARTS, "ready ms", HAPROXY, AtMost(1.0)),
        target("`sockmap`: started no slower than HAProxy", SOCKMAP, STARTS, "ready ms", HAPROXY, AtMost(1.0)),
        target("`splice`: started no slower than HAProxy", SPLICE, STARTS, "ready ms", HAPROXY, AtMost(1.0)),
        target("`direct`: at most 24 MiB of RSS after the start", DIRECT, &["start"], "RSS MiB", Over::Nothing, AtMost(24.0)),
        target("`sockmap`: at most 24 MiB of RSS after the start", SOCKMAP, &["start"], "RSS MiB", Over::Nothing, AtMost(24.0)),
        target("`splice`: at most 12 MiB of RSS after the start", SPLICE, &["start"], "RSS MiB", Over::Nothing, AtMost(12.0)),
        target("`sockmap`: at most 8 KiB of RSS for an idle connection", SOCKMAP, IDLE, "RSS KiB/connection", Over::Nothing, AtMost(8.0)),
        target("`splice`: at most 8 KiB of RSS for an idle connection", SPLICE, IDLE, "RSS KiB/connection", Over::Nothing, AtMost(8.0)),
        target("`direct`: at most 1.2 × the CPU of no proxy with many connections or routes", DIRECT, GROWTH, "CPU s/10k", NO_PROXY, AtMost(1.2)),
        target("`sockmap`: a request takes at most 1.2 × its CPU with 64 connections and one route", SOCKMAP, GROWTH, "proxy CPU s/10k", Over::Load("round-trips-64"), AtMost(1.2)),
        target("`splice`: a request takes at most 1.2 × its CPU with 64 connections and one route", SPLICE, GROWTH, "proxy CPU s/10k", Over::Load("round-trips-64"), AtMost(1.2)),
        target("`direct`: 1,000 routes reloaded no slower than HAProxy", DIRECT, RELOAD, "reload ms", HAPROXY, AtMost(1.0)),
        target("`sockmap`: 1,000 routes reloaded no slower than HAProxy", SOCKMAP, RELOAD, "reload ms", HAPROXY, AtMost(1.0)),
        target("`splice`: 1,000 routes reloaded no slower than HAProxy", SPLICE, RELOAD, "reload ms", HAPROXY, AtMost(1.0)),
        target("`direct`: at most 1.5 × the p99.9 during that reload", DIRECT, RELOAD, "meanwhile/before", Over::Nothing, AtMost(1.5)),
        target("`sockmap`: at most 1.5 × the p99.9 during that reload", SOCKMAP, RELOAD, "meanwhile/before", Over::Nothing, AtMost(1.5)),
        target("`splice`: at most 1.5 × the p99.9 during that reload", SPLICE, RELOAD, "meanwhile/before", Over::Nothing, AtMost(1.5)),
        target("`direct`: served again no later than HAProxy when a server fails", DIRECT, FAILOVER, "first success ms", HAPROXY, AtMost(1.0)),
        target("`direct`: no more failed calls than HAProxy when a server fails", DIRECT, FAILOVER, "failed calls", HAPROXY, AtMost(1.0)),
        target("`sockmap`: served again no later than HAProxy when a server fails", SOCKMAP, FAILOVER, "first success ms", HAPROXY, AtMost(1.0)),
        target("`sockmap`: no more failed calls than HAProxy when a server fails", SOCKMAP, FAILOVER, "failed calls", HAPROXY, AtMost(1.0)),
        target("`splice`: served again no later than HAProxy when a server fails", SPLICE, FAILOVER, "first success ms", HAPROXY, AtMost(1.0)),
        target("`splice`: no more failed calls than HAProxy when a server fails", SPLICE, FAILOVER, "failed calls", HAPROXY, AtMost(1.0)),
        target("`direct`: at most 2 % of a core to check 1,000 endpoints", DIRECT, CHECKS, "CPU of a core %", Over::Nothing, AtMost(2.0)),
        target("`splice`: at most 2 % of a core to check 1,000 endpoints", SPLICE, CHECKS, "CPU of a core %", Over::Nothing, AtMost(2.0)),
    ]
};

/// A table of those that a run can tell about; nothing if there are none.
pub(crate) fn table(report: &Report) -> Option<Table> {
    let mut table = Table::new(["target", "met", "missed"].map(str::to_owned).into());
    let mut any = false;
    for target in TARGETS {
        let (met, missed) = target.check(report);
        if !(met.is_empty() && missed.is_empty()) {
            table.row(vec![target.says.into(), met.join(", "), missed.join(", ")]);
            any = true;
        }
    }
    any.then_some(table)
}

impl Target {
    /// The loads in which it is met and those in which it is missed, each with the figure.
    fn check(&self, report: &Report) -> (Vec<String>, Vec<String>) {
        let (mut met, mut missed) = (Vec::new(), Vec::new());
        for name in self.loads {
            let Some(value) = self.value(report, name) else { continue };
            let holds = match self.bound {
                Bound::AtLeast(bound) => value >= bound,
                Bound::AtMost(bound) => value <= bound,
            };
            let list = if holds { &mut met } else { &mut missed };
            list.push(format!("{name} {value:.2}"));
        }
        (met, missed)
    }

    fn value(&self, report: &Report, load: &str) -> Option<f64> {
        let of = |load: &str, subject| {
            let load = *report.loads.iter().find(|known| known.name == load)?;
            report.results.median(load, subject, self.figure)
        };
        let value = of(load, self.subject)?;
        let base = match self.over {
            Over::Nothing => 1.0,
            Over::Subject(subject) => of(load, subject)?,
            Over::Load(load) => of(load, self.subject)?,
        };
        (base > 0.0).then(|| value / base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::catalogue::LOADS;
    use crate::bench::report::tests::report;

    #[test]
    fn every_target_is_about_figures_that_exist() {
        for target in TARGETS {
            for name in target.loads {
                let load = LOADS.iter().find(|load| load.name == *name).expect("a load");
                assert!(
                    load.figures().iter().any(|it| it.name == target.figure),
                    "{}",
                    target.says
                );
            }
        }
    }

    #[test]
    fn a_target_is_met_or_missed_by_the_medians() {
        let report = report(&[
            ("get", "no proxy", &[100.0, 102.0, 98.0]),
            ("get", DIRECT, &[97.0]),
            ("select", "no proxy", &[100.0]),
            ("select", DIRECT, &[96.0]),
        ]);
        let (met, missed) = TARGETS[0].check(&report);
        assert_eq!((met, missed), (vec!["get 0.97".to_owned()], vec!["select 0.96".to_owned()]));
        assert!(TARGETS[1].check(&report).0.is_empty());
    }
}

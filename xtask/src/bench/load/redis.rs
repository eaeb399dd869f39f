//! Redis's own benchmark: many connections, small requests, by a client people know.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use ambassador::bench::latency::Latency;
use ambassador::bench::load::Target as _;
use ambassador_tests::process;
use anyhow::{Context, Result};

use super::{Served, Target};

/// Far more than the requests take when none is lost.
const DEADLINE: Duration = Duration::from_secs(60);

/// Sends GET requests on 50 connections, `pipeline` at a time on each. A reply that never comes
/// keeps the benchmark from ending, which is an error.
pub(crate) fn run(target: &Target, requests: u64, pipeline: u32) -> Result<Served> {
    let address = target.address(0);
    // GET asks for the key that SET has set.
    benchmark(address, ["-t", "set", "-n", "1", "-c", "1"])?;
    let (number, pipeline) = (requests.to_string(), pipeline.to_string());
    let before = target.read()?;
    let said = benchmark(address, ["-t", "get", "-n", &number, "-c", "50", "-P", &pipeline])?;
    let spent = (before, target.read()?);
    let (per_second, latency) =
        read(&said).with_context(|| format!("read the result of redis-benchmark: {said}"))?;
    Ok(Served { count: requests, per_second, latency, spent })
}

fn benchmark<'a>(
    address: SocketAddr,
    arguments: impl IntoIterator<Item = &'a str>,
) -> Result<String> {
    let mut command = Command::new("redis-benchmark");
    command.args(["-h", &address.ip().to_string(), "-p", &address.port().to_string()]);
    process::run(command.args(arguments), DEADLINE)
}

/// Requests a second, and the lines of the form `99.902% <= 5.719 milliseconds (...)`. Those skip
/// p99, which the summary has.
fn read(said: &str) -> Option<(f64, Latency)> {
    let summary = said.split_once("throughput summary:")?.1;
    let per_second = summary.split_whitespace().next()?.parse().ok()?;
    let names_and_values: Vec<_> =
        summary.lines().skip_while(|line| !line.contains("p99")).take(2).collect();
    let [names, values] = names_and_values[..] else { return None };
    let column = names.split_whitespace().position(|name| name == "p99")?;
    let p99: f64 = values.split_whitespace().nth(column)?.parse().ok()?;

    let section = said.split_once("percentile distribution:")?.1.split_once("Cumulative")?.0;
    let point = |line: &str| -> Option<(f64, f64)> {
        let (percent, rest) = line.trim().split_once("% <= ")?;
        let milliseconds: f64 = rest.split(' ').next()?.parse().ok()?;
        Some((percent.parse::<f64>().ok()? / 100.0, milliseconds * 1e3))
    };
    let points = section.lines().filter_map(point).chain([(0.99, p99 * 1e3)]).collect();
    Some((per_second, Latency::from_points(points)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_benchmark_says_is_understood() {
        let said = "GET: rps=0.0 (overall: 50176.2)\r====== GET ======\n  50 parallel clients\n\n\
                    Latency by percentile distribution:\n0.000% <= 0.159 milliseconds (cumulative count 1)\n\
                    50.000% <= 0.599 milliseconds (cumulative count 10004)\n\
                    99.902% <= 5.719 milliseconds (cumulative count 19981)\n\n\
                    Cumulative distribution of latencies:\n99.910% <= 9.103 milliseconds (cumulative count 2)\n\n\
                    Summary:\n  throughput summary: 50251.26 requests per second\n  latency summary (msec):\n\
                    \x20         avg       min       p50       p95       p99       max\n\
                    \x20       0.659     0.152     0.599     1.071     2.063     5.975\n";
        let (per_second, latency) = read(said).expect("a whole result");
        assert_eq!(per_second, 50251.26);
        assert_eq!(
            [0.5, 0.99, 0.999].map(|part| latency.at(part)),
            [599.0, 2063.0, 5719.0].map(Some)
        );
        assert!(read("====== GET ======\n").is_none());
    }
}

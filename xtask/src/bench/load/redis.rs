//! Redis's own benchmark: many connections, small requests, by a client people know.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use ambassador_tests::process;
use anyhow::{Context, Result};

/// Far more than the requests take when none is lost.
const DEADLINE: Duration = Duration::from_secs(60);

/// What redis-benchmark says.
pub(crate) struct Done {
    /// Requests in a second.
    pub(crate) per_second: f64,
    /// Half of the replies took at most so many milliseconds.
    pub(crate) p50: f64,
    /// All but one in a hundred took at most so many milliseconds.
    pub(crate) p99: f64,
}

/// Sends GET requests on 50 connections, `pipeline` at a time on each. A reply that never comes
/// keeps the benchmark from ending, which is an error.
pub(crate) fn run(address: SocketAddr, requests: u64, pipeline: u32) -> Result<Done> {
    // GET asks for the key that SET has set.
    benchmark(address, ["-t", "set", "-n", "1", "-c", "1"])?;
    let (requests, pipeline) = (requests.to_string(), pipeline.to_string());
    let csv =
        benchmark(address, ["-t", "get", "-n", &requests, "-c", "50", "-P", &pipeline, "--csv"])?;
    read(&csv).with_context(|| format!("read the result of redis-benchmark: {csv}"))
}

fn benchmark<'a>(
    address: SocketAddr,
    arguments: impl IntoIterator<Item = &'a str>,
) -> Result<String> {
    let mut command = Command::new("redis-benchmark");
    command.args(["-h", &address.ip().to_string(), "-p", &address.port().to_string()]);
    process::run(command.args(arguments), DEADLINE)
}

/// The line after the headings, by the names of the columns.
fn read(csv: &str) -> Option<Done> {
    let cells = |line: &str| -> Vec<String> {
        line.split(',').map(|cell| cell.trim_matches('"').to_owned()).collect()
    };
    let mut lines = csv.lines().skip_while(|line| !line.starts_with("\"test\""));
    let (names, values) = (cells(lines.next()?), cells(lines.next()?));
    let column = |name| values.get(names.iter().position(|known| known == name)?)?.parse().ok();
    Some(Done {
        per_second: column("rps")?,
        p50: column("p50_latency_ms")?,
        p99: column("p99_latency_ms")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_found_by_name() {
        let csv = "WARNING: no config\n\"test\",\"rps\",\"p99_latency_ms\",\"p50_latency_ms\"\n\
                   \"GET\",\"61349.69\",\"0.8\",\"0.4\"\n";
        let done = read(csv).expect("a whole result");
        assert_eq!((done.per_second, done.p50, done.p99), (61349.69, 0.4, 0.8));
        assert!(read("\"test\",\"rps\"\n").is_none());
    }
}

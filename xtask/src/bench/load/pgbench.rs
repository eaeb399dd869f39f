//! PostgreSQL's own benchmark, reading one row by its key: a client and a server that think about it.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use ambassador::bench::latency::Latency;
use ambassador::bench::load::Target as _;
use ambassador_tests::process;
use ambassador_tests::server::find;
use anyhow::{Context, Result, ensure};

use super::{Served, Target};

/// Far more than the transactions take when none is lost.
const DEADLINE: Duration = Duration::from_secs(60);
/// What the log of transactions is called; pgbench adds its process id.
const LOG: &str = "transactions";

/// Creates and fills the table.
pub(crate) fn prepare(address: SocketAddr) -> Result<()> {
    let mut pgbench = pgbench(address)?;
    process::run(pgbench.args(["--initialize", "--quiet", "--scale", "1"]), DEADLINE).map(drop)
}

/// Lets each of `clients` do so many transactions that they are `transactions` together. One that is
/// never answered keeps the benchmark from ending, which is an error, as a client is that gives up.
pub(crate) fn run(target: &Target, transactions: u64, clients: u64) -> Result<Served> {
    let directory = tempfile::tempdir().context("create a directory for pgbench's log")?;
    let each = (transactions / clients).max(1);
    let mut command = pgbench(target.address(0))?;
    command.args(["--select-only", "--no-vacuum", "--log"]).arg(format!("--log-prefix={LOG}"));
    command.args(["--client", &clients.to_string(), "--transactions", &each.to_string()]);
    let before = target.read()?;
    let said = process::run(command.current_dir(directory.path()), DEADLINE)?;
    let spent = (before, target.read()?);
    let per_second = rate(&said).with_context(|| format!("read the result of pgbench: {said}"))?;

    let mut took = Vec::new();
    for log in fs::read_dir(directory.path()).context("list pgbench's logs")? {
        let log = fs::read_to_string(log.context("list pgbench's logs")?.path())
            .context("read pgbench's log")?;
        took.extend(log.lines().filter_map(duration));
    }
    let count = each * clients;
    ensure!(took.len() as u64 == count, "{} of {count} transactions were done", took.len());
    Ok(Served { count, per_second, latency: Latency::of(took), spent })
}

fn pgbench(address: SocketAddr) -> Result<Command> {
    let mut command = Command::new(find("pgbench").context("find pgbench: it is not installed")?);
    command.args(["--host", &address.ip().to_string(), "--port", &address.port().to_string()]);
    command.args(["--username", "postgres"]).env("PGDATABASE", "postgres");
    Ok(command)
}

fn rate(said: &str) -> Option<f64> {
    let rest = said.lines().find_map(|line| line.strip_prefix("tps = "))?;
    rest.split(' ').next()?.parse().ok()
}

/// A line of the log: client, transaction, microseconds, and more.
fn duration(line: &str) -> Option<Duration> {
    line.split(' ').nth(2)?.parse().ok().map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pgbench_says_is_understood() {
        let said = "latency average = 0.070 ms\ntps = 14240.5 (without initial connection time)\n";
        assert_eq!(rate(said), Some(14240.5));
        assert_eq!(duration("0 199 2241 0 1175850568 995598"), Some(Duration::from_micros(2241)));
        assert_eq!((rate("nothing"), duration("0 199")), (None, None));
    }
}

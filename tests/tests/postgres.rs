//! PostgreSQL through the ambassador: psql, pgbench, and the Unix socket that psql looks for.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::Family;
use ambassador_tests::ambassador::Launch;
use ambassador_tests::pod;
use ambassador_tests::process::run;
use ambassador_tests::server::find;
use ambassador_tests::server::postgres::Postgres;
use ambassador_tests::way::{Road, Way};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn queries_are_answered() -> Result<()> {
    let pod = pod!("initdb", "postgres", "pg_isready", "psql");
    let postgres = Postgres::start(&pod.upstream)?;
    for way in Way::all()? {
        let road = Road::to(&postgres.address.into(), way, &pod.inside, Family::Tcp)?;
        let (host, port) = (road.address.host()?, road.address.port()?);
        query(pod.inside.command("psql"), &host, port).with_context(|| format!("by {way}"))?;
        road.has_carried(1, None)?;
    }
    Ok(())
}

/// psql is told a directory and a port, and finds the socket by itself; and the ambassador leads
/// from a Unix socket to another one.
#[test]
fn unix_sockets_lead_to_unix_sockets() -> Result<()> {
    let pod = pod!("initdb", "postgres", "pg_isready", "psql");
    let postgres = Postgres::start(&pod.upstream)?;
    for way in Way::RELAYS {
        for upstream in [&postgres.socket, &postgres.address.into()] {
            let directory = tempfile::tempdir().context("create a directory for the socket")?;
            let host = directory.path().to_str().context("read the directory's path")?;
            let _ambassador = Launch::new(&pod.inside)?
                .flag("--tier", way.to_string())
                .route(format!("db:unix:{host}/.s.PGSQL.5432={upstream}"))
                .start()?;
            query(pod.inside.command("psql"), host, 5432)
                .with_context(|| format!("by {way} to {upstream}"))?;
        }
    }
    Ok(())
}

/// Simple and prepared statements, transactions that wait for each other, a connection each.
#[test]
fn pgbench_runs() -> Result<()> {
    let pod = pod!("initdb", "postgres", "pg_isready", "psql", "pgbench");
    let postgres = Postgres::start(&pod.upstream)?;
    let pgbench = find("pgbench").context("find pgbench")?;
    for way in Way::all()? {
        let road = Road::to(&postgres.address.into(), way, &pod.inside, Family::Tcp)?;
        let (host, port) = (road.address.host()?, road.address.port()?.to_string());
        let bench = |load: &[&str]| {
            let mut command = pod.inside.command(&pgbench);
            command.args(["-h", &host, "-p", &port, "-U", "postgres"]).args(load).arg("postgres");
            run(&mut command, PATIENCE).with_context(|| format!("pgbench {load:?} by {way}"))
        };
        bench(&["--initialize", "--quiet", "--scale=1"])?;
        let mut connections = 1;
        // Before its clients, it connects to ask for the scale.
        for (load, clients, transactions) in [
            (&["--select-only", "-c8", "-t200"][..], 1 + 8, 8 * 200),
            (&["--select-only", "--protocol=prepared", "-c16", "-j2", "-t200"], 1 + 16, 16 * 200),
            (&["--select-only", "--connect", "-c4", "-t25"], 1 + 4 * 25, 4 * 25),
            (&["--builtin=tpcb-like", "--protocol=prepared", "-c16", "-t25"], 1 + 16, 16 * 25),
        ] {
            let report = bench(load)?;
            let processed = format!("actually processed: {transactions}/{transactions}\n");
            ensure!(
                report.contains(&processed) && report.contains("number of failed transactions: 0 "),
                "pgbench {load:?} by {way}: {report}"
            );
            connections += clients;
        }
        // Each of the last transactions moved an amount, and wrote it down.
        let books = "select count(*), sum(delta) = (select sum(abalance) from pgbench_accounts), \
                     sum(delta) = (select sum(bbalance) from pgbench_branches), \
                     sum(delta) = (select sum(tbalance) from pgbench_tellers) from pgbench_history";
        let balance = psql(pod.inside.command("psql"), &host, road.address.port()?, books)?;
        ensure!(balance == "400|t|t|t\n", "by {way}: the books say {balance}");
        road.has_carried(connections + 1, None)?;
        // Of the forty clients that kept a connection for many transactions, half.
        road.had_shortcuts((8 + 16 + 16) / 2).with_context(|| format!("by {way}"))?;
    }
    Ok(())
}

fn query(command: Command, host: &str, port: u16) -> Result<()> {
    // A short answer, and one of several megabytes.
    let query = "select count(*) from generate_series(1, 1000); \
                 select repeat(n::text, 1000) from generate_series(1, 1000) as n";
    let answer = psql(command, host, port, query)?;
    let mut lines = answer.lines();
    ensure!(lines.next() == Some("1000"), "the short answer is wrong: {answer:.100}");
    for n in 1..=1000 {
        ensure!(lines.next() == Some(n.to_string().repeat(1000).as_str()), "row {n} is wrong");
    }
    ensure!(lines.next().is_none(), "there are too many rows");
    Ok(())
}

fn psql(mut command: Command, host: &str, port: u16, query: &str) -> Result<String> {
    run(
        command
            .args(["--no-psqlrc", "--tuples-only", "--no-align", "-U", "postgres", "-h", host])
            .args(["-p", &port.to_string(), "-d", "postgres", "-c", query]),
        PATIENCE,
    )
}

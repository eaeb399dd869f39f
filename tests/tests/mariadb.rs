//! MariaDB through the ambassador: here the server speaks first.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::Family;
use ambassador_tests::place::Place;
use ambassador_tests::pod;
use ambassador_tests::process::run;
use ambassador_tests::server::mariadb::Mariadb;
use ambassador_tests::way::{Road, Way};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn queries_are_answered() -> Result<()> {
    let pod = pod!("mariadb-install-db", "mariadbd", "mariadb");
    let mariadb = Mariadb::start(&pod.upstream)?;
    for way in Way::all()? {
        let road = Road::to(&mariadb.address.into(), way, &pod.inside, Family::Tcp)?;
        let query = "select count(*), length(group_concat(seq)) from seq_1_to_100; \
                     select repeat(seq, 1000) from seq_1_to_1000";
        let answer = client(
            &pod.inside,
            road.address.tcp()?,
            "mariadb",
            &["--skip-column-names", "-D", "mysql", "-e", query],
        )
        .with_context(|| format!("by {way}"))?;
        let rows = (1..=1000).map(|n| n.to_string().repeat(1000));
        ensure!(
            answer.lines().eq(["100\t291".to_owned()].into_iter().chain(rows)),
            "by {way}: {answer:.100}"
        );
        road.has_carried(1, None)?;
    }
    Ok(())
}

/// Threads that wait inside their reads and writes, each on a connection of its own.
#[test]
fn threads_that_block_are_served() -> Result<()> {
    let pod = pod!("mariadb-install-db", "mariadbd", "mariadb", "mariadb-slap");
    let mariadb = Mariadb::start(&pod.upstream)?;
    let directly = |query: &str| {
        client(&pod.inside, mariadb.address, "mariadb", &["--skip-column-names", "-e", query])
    };
    directly(
        "create database shop; create table shop.sales (number int auto_increment primary key, \
              who bigint, what varchar(2000))",
    )?;
    for way in Way::all()? {
        let road = Road::to(&mariadb.address.into(), way, &pod.inside, Family::Tcp)?;
        directly("truncate shop.sales")?;
        let before = connections(&directly)?;
        let insert = "insert into shop.sales (who, what) \
                      values (connection_id(), repeat('so', 1000))";
        client(
            &pod.inside,
            road.address.tcp()?,
            "mariadb-slap",
            &[
                "--create-schema=shop",
                "--no-drop",
                "--concurrency=16",
                "--number-of-queries=1600",
                "--query",
                insert,
            ],
        )
        .with_context(|| format!("by {way}"))?;
        // Asking takes a connection too.
        let made = connections(&directly)? - before - 1;
        let sales = directly(
            "select count(*), max(number), count(distinct who), sum(length(what)) \
                              from shop.sales",
        )?;
        ensure!(sales == "1600\t1600\t16\t3200000\n", "by {way}: the sales are {sales}");
        road.has_carried(made, None)?;
        // Of the sixteen that insert, a hundred times each, half.
        road.had_shortcuts(16 / 2).with_context(|| format!("by {way}"))?;
    }
    Ok(())
}

/// How many connections the server has accepted, the one that asks among them.
fn connections(ask: &impl Fn(&str) -> Result<String>) -> Result<u64> {
    let answer = ask("show global status like 'Connections'")?;
    let count = answer.split_whitespace().nth(1).context("find the count of connections")?;
    count.parse().context("parse the count of connections")
}

fn client(place: &Place, server: SocketAddr, program: &str, words: &[&str]) -> Result<String> {
    run(
        place
            .command(program)
            .args(["--no-defaults", "--protocol=tcp", "-u", "root"])
            .args(["-h", &server.ip().to_string(), "-P", &server.port().to_string()])
            .args(words),
        PATIENCE,
    )
}

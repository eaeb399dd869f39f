//! `ambassador probe` of real servers: well, of the wrong role, without a password, full, on its way up.

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador;
use ambassador_tests::echo::Echo;
use ambassador_tests::installed;
use ambassador_tests::place::Place;
use ambassador_tests::pod;
use ambassador_tests::process::{Process, run};
use ambassador_tests::server::dnsmasq::Dnsmasq;
use ambassador_tests::server::mariadb::Mariadb;
use ambassador_tests::server::nginx::Nginx;
use ambassador_tests::server::postgres::{Kind, PASSWORD, Postgres};
use ambassador_tests::server::redis::Redis;
use ambassador_tests::wait::{SOON, until_true};

#[test]
fn redis_answers_ping() -> Result<()> {
    installed!("redis-server");
    let redis = Redis::start(&Place::here())?;
    for address in [&redis.address.into(), &redis.socket] {
        well("redis", address, &[])?;
        well("redis", address, &["--role", "master"])?;
        refused("redis", address, &["--role", "replica"], "its role is master")?;
    }
    refused("mysql", &redis.address.into(), &["--timeout", "300ms"], "no answer within 300ms")?;
    refused("postgres", &redis.address.into(), &["--timeout", "300ms"], "")
}

#[test]
fn redis_is_logged_in_to_with_the_password_of_the_day() -> Result<()> {
    installed!("redis-server");
    let here = Place::here();
    let user = ["--user", "probe", "on", ">tuesday", "+ping", "+info"];
    let options = [&["--requirepass", "monday"], &user[..]].concat();
    let redis = Redis::start_with(&here, &options)?;
    let address = redis.address.into();
    let secret = tempfile::NamedTempFile::new().context("create a password file")?;
    let file = secret.path().to_str().context("read the file's path")?;
    refused("redis", &address, &[], "-NOAUTH")?;
    std::fs::write(file, "monday\n").context("write the password")?;
    well("redis", &address, &["--password-file", file, "--role", "primary"])?;
    std::fs::write(file, "tuesday\n").context("write the password")?;
    refused("redis", &address, &["--password-file", file], "-WRONGPASS")?;
    // One who may not ask ROLE.
    well("redis", &address, &["--password-file", file, "--user", "probe", "--role", "primary"])?;
    let replica = ["--password-file", file, "--user", "probe", "--role", "replica"];
    refused("redis", &address, &replica, "its role is master")
}

#[test]
fn redis_that_lost_its_master_is_not_well() -> Result<()> {
    installed!("redis-server");
    let here = Place::here();
    let master = Redis::start(&here)?;
    let follow = format!("127.0.0.1 {}", master.address.port());
    let options = ["--replicaof", &follow, "--replica-serve-stale-data", "no"];
    let replica = Redis::start_with(&here, &options)?;
    let address = replica.address.into();
    until_true("the replica's link", || {
        Ok(probe(&here, "redis", &address, &["--role", "replica"])?.is_empty())
    })?;
    refused("redis", &address, &["--role", "primary"], "its role is slave")?;
    drop(master);
    until_true("the replica's complaint", || {
        Ok(probe(&here, "redis", &address, &[])?.contains("redis: -MASTERDOWN"))
    })
}

#[test]
fn postgres_is_asked_without_a_line_in_its_log() -> Result<()> {
    installed!("initdb", "postgres", "pg_isready", "psql", "openssl");
    let kind = Kind { login: "scram-sha-256", standby: false, encrypts: true };
    let postgres = Postgres::start_with(&Place::here(), kind)?;
    let before = postgres.process.stderr();
    for address in [&postgres.address.into(), &postgres.socket] {
        well("postgres", address, &[])?;
    }
    // That it asks for a password is an answer; that there is no such user it would tell later.
    well("postgres", &postgres.address.into(), &["--user", "nobody"])?;
    let who = ["--user", "postgres", "--role", "primary"];
    well("postgres", &postgres.socket, &who)?;
    refused("postgres", &postgres.address.into(), &who, "give a password file")?;
    // What comes next is logged, and what came before would be by then.
    refused("postgres", &postgres.socket, &["--user", "nobody"], "\"nobody\" does not exist")?;
    until_true("a line of the log", || Ok(postgres.process.stderr().contains("nobody")))?;
    let after = postgres.process.stderr();
    ensure!(after[before.len()..].lines().count() == 1, "it logged {}", &after[before.len()..]);
    Ok(())
}

#[test]
fn postgres_is_logged_in_to() -> Result<()> {
    installed!("initdb", "postgres", "pg_isready");
    let secret = tempfile::NamedTempFile::new().context("create a password file")?;
    let file = secret.path().to_str().context("read the file's path")?;
    let who =
        |more: &[&'static str]| [&["--user", "postgres", "--password-file", file], more].concat();
    for (login, standby, is, other) in
        [("scram-sha-256", false, "primary", "replica"), ("md5", true, "replica", "primary")]
    {
        let kind = Kind { login, standby, encrypts: false };
        let postgres = Postgres::start_with(&Place::here(), kind)?;
        let address = postgres.address.into();
        std::fs::write(file, "another password").context("write the password")?;
        refused("postgres", &address, &who(&[]), "password authentication failed")?;
        std::fs::write(file, PASSWORD).context("write the password")?;
        well("postgres", &address, &who(&["--role", is]))?;
        refused("postgres", &address, &who(&["--role", other]), &format!("it is a {is}"))?;
        refused("postgres", &address, &who(&["--database", "none"]), "\"none\" does not exist")?;
    }
    let kind = Kind { login: "password", standby: false, encrypts: false };
    let postgres = Postgres::start_with(&Place::here(), kind)?;
    refused("postgres", &postgres.address.into(), &who(&[]), "in clear")
}

/// A server locks out who is heard to break off too often, and with that the app beside.
#[test]
fn mariadb_locks_nobody_out_for_being_probed() -> Result<()> {
    let pod = pod!("mariadb-install-db", "mariadbd", "mariadb", "dnsmasq");
    // It counts only those whose address it knows to have a name, or none.
    let _dnsmasq = Dnsmasq::start(&pod.upstream, &[])?;
    let resolv_conf = Dnsmasq::resolv_conf(pod.upstream.ipv4);
    let mariadb = Mariadb::start_with(
        &pod.upstream.with_resolver(&resolv_conf)?,
        &["--max-connect-errors=2", "--host-cache-size=128", "--max-connections=10"],
    )?;
    let address = mariadb.address.into();
    let Address::Unix(socket) = &mariadb.socket else { anyhow::bail!("no Unix socket") };
    let root = |query: &str| {
        let mut client = pod.upstream.command("mariadb");
        client.args(["--no-defaults", "--skip-column-names", "-u", "root", "-S"]).arg(socket);
        run(client.args(["-e", query]), SOON)
    };
    // Else nobody may connect from there, and that is what it says.
    let refusal = probe(&pod.inside, "mysql", &address, &[])?;
    ensure!(refusal.contains("mysql: Host '10.77.0.1' is not allowed to connect"), "{refusal}");
    root("create user app identified by 'secret'; flush status")?;
    let probed = || -> Result<String> {
        for _ in 0..5 {
            let refusal = probe(&pod.inside, "mysql", &address, &[])?;
            ensure!(refusal.is_empty(), "{refusal}");
        }
        root("show global status like 'Aborted_connects'")
    };
    ensure!(probed()?.trim_end() == "Aborted_connects\t5", "they were not refused logins");
    // Where there is the user, it leaves no trace.
    root("create user ambassador")?;
    ensure!(probed()?.trim_end() == "Aborted_connects\t5", "a login was aborted");
    Ok(())
}

#[test]
fn http_is_judged_by_its_status() -> Result<()> {
    installed!("nginx");
    let here = Place::here();
    let port = here.port()?;
    let address: Address = std::net::SocketAddr::from((here.ipv4, port)).into();
    let configuration = format!(
        "events {{}} http {{ access_log off; server {{
            listen 127.0.0.1:{port}; listen unix:DIRECTORY/http.sock; server_name _;
            location /ill {{ return 503; }}
            location /moved {{ return 301 /; }}
            location /host {{ if ($http_host = app.example.com) {{ return 204; }} return 404; }}
            location / {{ return 200 well; }}
        }} }}"
    );
    let nginx = Nginx::start(&here, &configuration, &address)?;
    let at = |path: &str| format!("{address}{path}");
    http(&at(""), &[], None)?;
    http(&at("/healthz"), &["--status", "200"], None)?;
    http(&at("/moved"), &[], None)?;
    http(&at("/moved"), &["--status", "200-299"], Some("status 301, expected 200-299"))?;
    http(&at("/ill"), &[], Some("status 503, expected 200-399"))?;
    http(&at("/ill"), &["--status", "503"], None)?;
    http(&at("/host"), &[], Some("status 404"))?;
    http(&at("/host"), &["--host", "app.example.com"], None)?;
    let socket = nginx.directory().join("http.sock");
    http(&format!("unix:{}:/healthz", socket.display()), &[], None)?;
    http(&format!("unix:{}:/ill", socket.display()), &[], Some("status 503"))?;
    http("127.0.0.1:1/x", &[], Some("127.0.0.1:1"))?;
    refused("redis", &address, &[], "redis: ")
}

/// What answers, but says nothing of its own or the wrong thing, is not well.
#[test]
fn a_server_of_something_else_is_not_well() -> Result<()> {
    let echo = Echo::new(Family::Tcp)?;
    let address = echo.address().clone();
    refused("redis", &address, &[], "redis: ")?;
    refused("http", &address, &[], "not an answer of HTTP")?;
    refused("mysql", &address, &["--timeout", "300ms"], "no answer within 300ms")?;
    refused("postgres", &address, &[], "postgres: ")?;
    well("tcp", &address, &[])
}

fn http(target: &str, options: &[&str], told: Option<&str>) -> Result<()> {
    let refusal = judged(&Place::here(), "http", target, options)?;
    let right = told.map_or(refusal.is_empty(), |told| refusal.contains(told));
    ensure!(right, "{target} {options:?}: {refusal:?}");
    Ok(())
}

fn well(protocol: &str, address: &Address, options: &[&str]) -> Result<()> {
    let refusal = probe(&Place::here(), protocol, address, options)?;
    ensure!(refusal.is_empty(), "{protocol} {address} {options:?}: {refusal}");
    Ok(())
}

fn refused(protocol: &str, address: &Address, options: &[&str], told: &str) -> Result<()> {
    let refusal = probe(&Place::here(), protocol, address, options)?;
    ensure!(!refusal.is_empty(), "{protocol} {address} {options:?} is well");
    ensure!(refusal.contains(told), "{protocol} {address} {options:?}: {refusal}");
    Ok(())
}

/// Its refusal, in one line; empty when the server is well.
fn probe(place: &Place, protocol: &str, address: &Address, options: &[&str]) -> Result<String> {
    judged(place, protocol, &address.to_string(), options)
}

fn judged(place: &Place, protocol: &str, target: &str, options: &[&str]) -> Result<String> {
    let mut command = ambassador::command(place)?;
    command.args(["probe", protocol, target]).args(options);
    let finished = Process::start(&mut command)?.finish(SOON)?;
    let refusal = finished.stderr.trim_end().to_owned();
    let lines = refusal.lines().count();
    match finished.code() {
        Some(0) => ensure!(lines == 0, "well, and yet: {refusal}"),
        Some(1) => ensure!(lines == 1, "not one line: {refusal}"),
        _ => anyhow::bail!("{}: {refusal}", finished.status),
    }
    Ok(refusal)
}

//! Configurations that cannot be meant: each is refused with one line that names file, place, problem
//! and fix, with exit code 78, before anything is bound.

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use ambassador_tests::ambassador;
use ambassador_tests::place::Place;
use ambassador_tests::pod::is_root;
use ambassador_tests::process::{Finished, Process, run};
use ambassador_tests::skip;
use ambassador_tests::wait::SOON;

const BAD_CONFIG: i32 = 78;

/// What is wrong, the lines of `routes` and `upstreams` that are, and words the error must have.
type Case = (&'static str, &'static str, &'static [&'static str]);

/// `TAKEN` stands for an address that somebody else listens on: whoever binds before everything is
/// checked fails in another way.
const CASES: &[Case] = &[
    (
        "unknown key, with the one that was meant",
        "routes: [{ name: a, listen: TAKEN, upstream: u, max_conections: 5 }]
upstreams: { u: { endpoints: ['db.test:5432'] } }",
        &[":2:", "max_conections", "max_connections"],
    ),
    (
        "unknown key at the top",
        "route: []
routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { endpoints: ['db.test:5432'] } }",
        &[":2:1", "route"],
    ),
    (
        "a list where a number belongs",
        "routes: [{ name: a, listen: TAKEN, upstream: u, max_connections: [1] }]
upstreams: { u: { endpoints: ['db.test:5432'] } }",
        &[":2:", "max_connections"],
    ),
    (
        "a word where a duration belongs",
        "routes: [{ name: a, listen: TAKEN, upstream: u, idle_timeout: soon }]
upstreams: { u: { endpoints: ['db.test:5432'] } }",
        &[":2:", "idle_timeout", "soon"],
    ),
    (
        "the same address twice",
        "routes:
  - { name: a, listen: TAKEN, upstream: u }
  - { name: b, listen: TAKEN, upstream: u }
upstreams: { u: { endpoints: ['db.test:5432'] } }",
        &["routes[1].listen", "TAKEN"],
    ),
    (
        "the same address twice, once as part of all addresses",
        "routes:
  - { name: a, listen: '127.0.0.1:15432', upstream: u }
  - { name: b, listen: '0.0.0.0:15432', upstream: u }
upstreams: { u: { endpoints: ['db.test:5432'] } }",
        &["routes[1].listen", "15432"],
    ),
    (
        "a route to itself",
        "routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { endpoints: [TAKEN] } }",
        &["routes[0]", "itself"],
    ),
    (
        "a route to itself by another route",
        "routes:
  - { name: a, listen: '127.0.0.1:15432', upstream: b }
  - { name: b, listen: TAKEN, upstream: a }
upstreams: { a: { endpoints: ['localhost:15432'] }, b: { endpoints: [TAKEN] } }",
        &["itself"],
    ),
    (
        "a Unix socket to itself",
        "routes: [{ name: a, listen: 'unix:/tmp/loop.sock', upstream: u }]
upstreams: { u: { endpoints: ['unix:/tmp/loop.sock'] } }",
        &["routes[0]", "itself"],
    ),
    (
        "an endpoint without a port",
        "routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { endpoints: ['db.test'] } }",
        &[":3:", "endpoints", "db.test", "port"],
    ),
    (
        "an upstream without endpoints",
        "routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { endpoints: [] } }",
        &["endpoints"],
    ),
    (
        "a weight of nothing",
        "routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { endpoints: ['db.test:5432:0'] } }",
        &[":3:", "weight", "0"],
    ),
    (
        "a weight beyond reason",
        "routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { endpoints: ['db.test:5432:99999'] } }",
        &[":3:", "weight", "99999"],
    ),
    (
        "port 0 to listen on",
        "routes: [{ name: a, listen: '127.0.0.1:0', upstream: u }]
upstreams: { u: { endpoints: ['db.test:5432'] } }",
        &[":2:", "listen", "port"],
    ),
    (
        "port 0 to connect to",
        "routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { endpoints: ['db.test:0'] } }",
        &[":3:", "endpoints", "port"],
    ),
    (
        "a port that is none",
        "routes: [{ name: a, listen: 70000, upstream: u }]
upstreams: { u: { endpoints: ['db.test:5432'] } }",
        &[":2:", "listen", "70000"],
    ),
    (
        "a NUL byte in a path",
        "routes: [{ name: a, listen: \"unix:/tmp/a\\0b\", upstream: u }]
upstreams: { u: { endpoints: ['db.test:5432'] } }",
        &[":2:", "listen"],
    ),
    (
        "a newline in a host's name",
        "routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { endpoints: [\"db\\n.test:5432\"] } }",
        &[":3:", "endpoints"],
    ),
    (
        "an upstream that is not there, with the one that was meant",
        "routes: [{ name: a, listen: TAKEN, upstream: order-db }]
upstreams: { orders-db: { endpoints: ['db.test:5432'] } }",
        &["routes[0].upstream", "order-db", "orders-db"],
    ),
    (
        "a key twice",
        "routes: [{ name: a, listen: TAKEN, upstream: u, name: b }]
upstreams: { u: { endpoints: ['db.test:5432'] } }",
        &["name"],
    ),
    (
        "a deadline before the grace is over",
        "drain: { grace: 30s, deadline: 5s }
routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { endpoints: ['db.test:5432'] } }",
        &["drain", "grace", "deadline"],
    ),
    (
        "a balance that does not exist",
        "routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { endpoints: ['db.test:5432'], balance: roundrobin } }",
        &[":3:", "balance", "round_robin"],
    ),
    (
        "a tier that does not exist",
        "acceleration: { tier: warp }
routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { endpoints: ['db.test:5432'] } }",
        &[":2:", "tier", "warp"],
    ),
    (
        "profiles, and nothing that says which",
        "routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { profiles: { dev: 'db.test:5432' } } }",
        &[":3:", "upstreams.u.profiles", "environment"],
    ),
    (
        "profiles, and no evidence of one",
        "environment: { from: ['env:AMBASSADOR_TESTS_NOWHERE', 'file:/nowhere'] }
routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { profiles: { dev: 'db.test:5432', prod: 'db.test:5433' } } }",
        &[":2:", "environment.from", "env:AMBASSADOR_TESTS_NOWHERE", "file:/nowhere", "dev, prod"],
    ),
    (
        "evidence of an unknown profile",
        "environment: { from: ['env:PATH'] }
routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { profiles: { dev: 'db.test:5432', prod: 'db.test:5433' } } }",
        &[":2:", "environment.from", "env:PATH is", "none of dev, prod"],
    ),
    (
        "evidence that cannot be read",
        "environment: { from: ['file:/'], default: dev }
routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { profiles: { dev: 'db.test:5432' } } }",
        &[":2:", "environment.from", "file:/ cannot be read"],
    ),
    (
        "an endpoint without a port in a profile that is not in force",
        "environment: { from: ['env:AMBASSADOR_TESTS_NOWHERE'], default: dev }
routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { profiles: { dev: 'db.test:5432', prod: 'db.test' } } }",
        &[":4:", "upstreams.u.profiles.prod", "db.test", "port"],
    ),
    (
        "an upstream without the profile in force",
        "environment: { from: ['env:AMBASSADOR_TESTS_NOWHERE'], default: dev }
routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { profiles: { prod: 'db.test:1' } }, v: { profiles: { dev: 'db.test:1' } } }",
        &[":4:", "upstreams.u.profiles", "only prod", "dev is in force"],
    ),
    (
        "a default that no upstream has",
        "environment: { from: ['env:AMBASSADOR_TESTS_NOWHERE'], default: stage }
routes: [{ name: a, listen: TAKEN, upstream: u }]
upstreams: { u: { profiles: { staging: 'db.test:1' } } }",
        &[":2:", "environment.default", "stage", "staging"],
    ),
];

#[test]
fn each_mistake_is_one_line_and_nothing_is_bound() -> Result<()> {
    let owner = TcpListener::bind("127.0.0.1:0").context("take a port")?;
    let taken = owner.local_addr().context("ask for the port taken")?.to_string();
    let directory = tempfile::tempdir().context("create a directory")?;
    let file = directory.path().join("mistake.yaml");
    let mut complaints = Vec::new();
    for (mistake, lines, words) in CASES {
        let text = format!("version: 1\n{}\n", lines.replace("TAKEN", &format!("'{taken}'")));
        fs::write(&file, text).context("write a configuration")?;
        let words: Vec<_> =
            words.iter().map(|word| if *word == "TAKEN" { &taken } else { *word }).collect();
        let verdict = refused(&file).and_then(|finished| explained(&finished, &file, &words));
        complaints.extend(verdict.err().map(|error| format!("{mistake}: {error:#}")));
    }
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

#[test]
fn no_routes_at_all_are_refused_with_an_example() -> Result<()> {
    let finished = with(&["run"])?;
    ensure!(finished.code() == Some(BAD_CONFIG), "{}: {}", finished.status, finished.stderr);
    ensure!(finished.stderr.lines().count() == 1, "{}", finished.stderr);
    ensure!(finished.stderr.contains("--route 5432="), "{}", finished.stderr);
    Ok(())
}

#[test]
fn an_empty_file_is_refused() -> Result<()> {
    let directory = tempfile::tempdir().context("create a directory")?;
    for (name, text) in [("empty.yaml", ""), ("blank.yaml", "\n\n"), ("empty.toml", "")] {
        let file = directory.path().join(name);
        fs::write(&file, text).context("write an empty file")?;
        explained(&refused(&file)?, &file, &[])?;
    }
    Ok(())
}

#[test]
fn a_file_that_is_no_text_is_refused() -> Result<()> {
    let directory = tempfile::tempdir().context("create a directory")?;
    let cases: [(&str, Vec<u8>); 4] = [
        ("binary.yaml", (0..=u8::MAX).cycle().take(10_000).collect()),
        ("nul.yaml", b"version: 1\nroutes:\0 []\n".to_vec()),
        ("deep.yaml", [b"routes: ".to_vec(), vec![b'['; 100_000]].concat()),
        ("huge.yaml", vec![b'#'; 8 << 20]),
    ];
    for (name, bytes) in cases {
        let file = directory.path().join(name);
        fs::write(&file, bytes).context("write a file")?;
        explained(&refused(&file)?, &file, &[]).with_context(|| name.to_owned())?;
    }
    Ok(())
}

#[test]
fn a_file_that_is_not_there_is_refused() -> Result<()> {
    let directory = tempfile::tempdir().context("create a directory")?;
    let file = directory.path().join("missing.yaml");
    explained(&refused(&file)?, &file, &[])?;
    explained(&refused(directory.path())?, directory.path(), &[])
}

#[test]
fn a_file_that_may_not_be_read_is_refused() -> Result<()> {
    if !is_root() {
        skip!("only root can make a file that another user may not read, and become that user");
    }
    let directory = tempfile::tempdir().context("create a directory")?;
    let open = directory.path().to_str().context("read the directory's path")?;
    let binary = directory.path().join("ambassador");
    fs::copy(ambassador::binary()?, &binary).context("copy the binary")?;
    let file = directory.path().join("secret.yaml");
    fs::write(&file, "version: 1\n").context("write a file")?;
    run(std::process::Command::new("chmod").args(["0755", open]), SOON)?;
    run(std::process::Command::new("chmod").arg("0600").arg(&file), SOON)?;
    let finished = Process::start(
        Place::here()
            .command("setpriv")
            .args(["--reuid=65532", "--regid=65532", "--clear-groups", "--"])
            .arg(&binary)
            .args(["run", "--config"])
            .arg(&file),
    )?
    .finish(SOON)?;
    explained(&finished, &file, &["ermission"])
}

#[test]
fn a_path_longer_than_a_socket_address_is_refused() -> Result<()> {
    let long = format!("unix:/tmp/{}", "x".repeat(200));
    for route in [format!("{long}=db.test:5432"), format!("15432={long}")] {
        let finished = with(&["run", "--route", &route])?;
        ensure!(finished.code() == Some(BAD_CONFIG), "{}", finished.status);
        ensure!(finished.stderr.lines().count() == 1, "{}", finished.stderr);
        ensure!(finished.stderr.contains("--route"), "{}", finished.stderr);
    }
    Ok(())
}

#[test]
fn bad_routes_on_the_command_line_are_refused() -> Result<()> {
    for route in [
        "",
        "=",
        "15432",
        "15432=",
        "=db.test:5432",
        "0=db.test:5432",
        "15432=db.test",
        "15432=db.test:",
        "15432=db.test:0",
        "15432=db.test:5432:0",
        "15432=db.test:5432,",
        "15432=::1:5432",
        "unix:=db.test:5432",
        "unix:relative.sock=db.test:5432",
        "15432=localhost:15432",
        "15432=db\u{7}.test:5432",
    ] {
        let finished = with(&["run", "--route", route])?;
        let told = &finished.stderr;
        ensure!(finished.code() == Some(BAD_CONFIG), "{route:?}: {} {told}", finished.status);
        ensure!(told.lines().count() == 1, "{route:?}: {told}");
        ensure!(!told.trim_end().contains(char::is_control), "{route:?}: {told:?}");
    }
    Ok(())
}

#[test]
fn check_finds_the_same_mistakes() -> Result<()> {
    let directory = tempfile::tempdir().context("create a directory")?;
    let file = directory.path().join("mistake.yaml");
    fs::write(&file, "version: 1\nroutes: [{ name: a }]\n").context("write a configuration")?;
    let checked = Process::start(ambassador::command(&Place::here())?.arg("check").arg(&file))?;
    let (checked, refused) = (checked.finish(SOON)?, refused(&file)?);
    ensure!(checked.code() == Some(BAD_CONFIG), "{}", checked.status);
    ensure!(checked.stderr == refused.stderr, "{} / {}", checked.stderr, refused.stderr);
    Ok(())
}

fn refused(file: &Path) -> Result<Finished> {
    let file = file.to_str().context("read the file's path")?;
    with(&["run", "--config", file])
}

fn with(words: &[&str]) -> Result<Finished> {
    let more = ["--admin-http", "off", "--control", "off"];
    Process::start(ambassador::command(&Place::here())?.args(words).args(more))?.finish(SOON)
}

/// One line, with the file's name and every one of `words`.
fn explained(finished: &Finished, file: &Path, words: &[&str]) -> Result<()> {
    let told = &finished.stderr;
    let code = finished.code();
    ensure!(code == Some(BAD_CONFIG), "it ended with {}: {told}", finished.status);
    ensure!(told.lines().count() == 1, "not one line: {told}");
    ensure!(told.len() < 600, "not a line that anybody reads: {told:.600}");
    ensure!(!told.trim_end().contains(char::is_control), "control characters: {told:?}");
    ensure!(finished.stdout.is_empty(), "on the standard output: {}", finished.stdout);
    let name = file.to_str().context("read the file's path")?;
    for word in words.iter().copied().chain([name]) {
        ensure!(told.contains(word), "no {word:?} in: {told}");
    }
    Ok(())
}

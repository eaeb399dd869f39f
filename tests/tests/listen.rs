//! Where routes listen: which addresses, which files, and what happens when one of them is taken.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador::Launch;
use ambassador_tests::echo::Echo;
use ambassador_tests::place::Place;
use ambassador_tests::process::Finished;
use ambassador_tests::wait::SOON;

#[test]
fn port_alone_means_both_loopback_addresses() -> Result<()> {
    let (here, echo) = (Place::here(), Echo::new(Family::Tcp)?);
    let port = here.port()?;
    let _ambassador = Launch::new(&here)?.route(format!("{port}={}", echo.address())).start()?;
    answers(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())?;
    answers(&SocketAddr::from((Ipv6Addr::LOCALHOST, port)).into())?;
    let other = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), port));
    ensure!(Address::from(other).connect().is_err(), "{other} is not what was asked for");
    Ok(())
}

#[test]
fn one_address_means_only_that_address() -> Result<()> {
    let (here, echo) = (Place::here(), Echo::new(Family::Tcp)?);
    let (v4, v6) = (here.port()?, here.port()?);
    let second = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), v4));
    let sixth = SocketAddr::from((Ipv6Addr::LOCALHOST, v6));
    let _ambassador = Launch::new(&here)?
        .route(format!("{second}={}", echo.address()))
        .route(format!("{sixth}={}", echo.address()))
        .start()?;
    answers(&second.into())?;
    answers(&sixth.into())?;
    for deaf in
        [SocketAddr::from((Ipv4Addr::LOCALHOST, v4)), SocketAddr::from((Ipv4Addr::LOCALHOST, v6))]
    {
        ensure!(Address::from(deaf).connect().is_err(), "{deaf} is not what was asked for");
    }
    Ok(())
}

#[test]
fn a_pods_own_address_can_be_listened_on() -> Result<()> {
    let pod = ambassador_tests::pod!();
    let upstream = Address::from(SocketAddr::from((pod.upstream.ipv6, 0)));
    let echo = Echo::on(pod.upstream.enter(|| upstream.listen())?, "");
    let listen = SocketAddr::from((pod.inside.ipv4, pod.inside.port()?));
    let _ambassador =
        Launch::new(&pod.inside)?.route(format!("{listen}={}", echo.address())).start()?;
    pod.upstream.enter(|| answers(&listen.into()))
}

#[test]
fn unix_sockets_have_the_mode_that_was_asked_for() -> Result<()> {
    let echo = Echo::new(Family::Unix)?;
    let launch = Launch::new(&Place::here())?;
    let (open, private) = (launch.directory().join("open"), launch.directory().join("private"));
    let config = format!(
        "version: 1
routes:
  - {{ name: open, listen: 'unix:{}', upstream: echo }}
  - {{ name: private, listen: 'unix:{}', upstream: echo, socket_mode: '0600' }}
upstreams:
  echo: {{ endpoints: ['{}'] }}
",
        open.display(),
        private.display(),
        echo.address()
    );
    let ambassador = launch.config(&config)?.start()?;
    ensure!(mode(&open)? == 0o666, "the default is {:o}", mode(&open)?);
    ensure!(mode(&private)? == 0o600, "0600 became {:o}", mode(&private)?);
    ensure!(mode(&ambassador.control())? == 0o600, "the control socket is for its owner only");
    answers(&Address::Unix(open))?;
    answers(&Address::Unix(private))
}

#[test]
fn unix_sockets_are_removed_at_the_end() -> Result<()> {
    let echo = Echo::new(Family::Unix)?;
    let directory = tempfile::tempdir().context("create a directory")?;
    let path = directory.path().join("app.sock");
    let ambassador = Launch::new(&Place::here())?
        .route(format!("unix:{}={}", path.display(), echo.address()))
        .start()?;
    ambassador.end()?;
    ensure!(!path.exists(), "{} is still there", path.display());
    Ok(())
}

#[test]
fn a_stale_unix_socket_is_replaced() -> Result<()> {
    let echo = Echo::new(Family::Unix)?;
    let launch = Launch::new(&Place::here())?;
    let path = launch.directory().join("app.sock");
    drop(UnixListener::bind(&path).context("leave a socket behind")?);
    ensure!(path.exists(), "closing a socket leaves its file");
    let route = format!("unix:{}={}", path.display(), echo.address());
    let ambassador = launch.route(&route).start()?;
    answers(&Address::Unix(path.clone()))?;

    // Killed, it cannot clean up; the next one finds its way all the same.
    drop(ambassador.process);
    ensure!(path.exists(), "a killed process leaves its socket");
    let _ambassador = Launch::new(&Place::here())?.route(&route).start()?;
    answers(&Address::Unix(path))
}

#[test]
fn a_unix_socket_in_use_is_left_alone() -> Result<()> {
    let (owner, echo) = (Echo::new(Family::Unix)?, Echo::new(Family::Unix)?);
    let refused = refused(&[format!("{}={}", owner.address(), echo.address())])?;
    ensure!(refused.stderr.contains(&owner.address().to_string()), "{}", refused.stderr);
    answers(owner.address())
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() -> Result<()> {
    let echo = Echo::new(Family::Unix)?;
    let directory = tempfile::tempdir().context("create a directory")?;
    let path = directory.path().join("precious");
    fs::write(&path, "data").context("write a file")?;
    let refused = refused(&[format!("unix:{}={}", path.display(), echo.address())])?;
    ensure!(refused.stderr.contains("precious"), "{}", refused.stderr);
    ensure!(fs::read_to_string(&path).context("read the file")? == "data");
    Ok(())
}

#[test]
fn a_port_in_use_is_refused_with_its_owners_name() -> Result<()> {
    let echo = Echo::new(Family::Tcp)?;
    let taken = TcpListener::bind("127.0.0.1:0").context("take a port")?;
    let address = taken.local_addr().context("ask for the port taken")?;
    let refused = refused(&[format!("{address}={}", echo.address())])?;
    for word in [address.to_string(), std::process::id().to_string()] {
        ensure!(refused.stderr.contains(&word), "no {word} in: {}", refused.stderr);
    }
    Ok(())
}

#[test]
fn nothing_stays_bound_when_one_address_is_taken() -> Result<()> {
    let echo = Echo::new(Family::Tcp)?;
    let directory = tempfile::tempdir().context("create a directory")?;
    let first = directory.path().join("first.sock");
    let taken = TcpListener::bind("127.0.0.1:0").context("take a port")?;
    let address = taken.local_addr().context("ask for the port taken")?;
    let refused = refused(&[
        format!("unix:{}={}", first.display(), echo.address()),
        format!("{address}={}", echo.address()),
    ])?;
    ensure!(!refused.stderr.contains("\"ready\""), "it was never ready: {}", refused.stderr);
    ensure!(!first.exists(), "the first route's socket is still there");
    Ok(())
}

/// Connections of the last run may linger in the kernel; they must not keep the next one waiting.
#[test]
fn a_restart_binds_the_same_port_at_once() -> Result<()> {
    let (here, echo) = (Place::here(), Echo::new(Family::Tcp)?);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, here.port()?)).into();
    for _ in 0..3 {
        let route = format!("{address}={}", echo.address());
        let ambassador = Launch::new(&here)?.route(route).start()?;
        let client = Address::connect(&address)?;
        client.ask(b"hello", b"hello")?;
        ambassador.process.signal(libc::SIGKILL)?;
        client.hear_close()?;
    }
    Ok(())
}

#[test]
fn two_hundred_routes_are_ready_at_once() -> Result<()> {
    const ROUTES: usize = 200;
    let (here, echo) = (Place::here(), Echo::greeting("e")?);
    let mut launch = Launch::new(&here)?;
    let directory = launch.directory().to_owned();
    let mut addresses = Vec::new();
    for number in 0..ROUTES {
        let address = match number % 2 {
            0 => SocketAddr::from((Ipv4Addr::LOCALHOST, here.port()?)).into(),
            _ => Address::Unix(directory.join(format!("{number}.sock"))),
        };
        launch = launch.route(format!("route-{number}:{address}={}", echo.address()));
        addresses.push(address);
    }
    let ambassador = launch.start()?;
    for address in &addresses {
        let client = address.connect()?;
        ensure!(client.hear(1)? == b"e", "{address} leads elsewhere");
        client.ask(b"hello", b"hello")?;
    }
    let active = ambassador.metrics()?.sum("ambassador_tier_info", &[]);
    ensure!(active == Some(ROUTES as f64), "routes in the metrics: {active:?}");
    Ok(())
}

fn answers(address: &Address) -> Result<()> {
    address.connect()?.ask(b"hello", b"hello").with_context(|| format!("on {address}"))
}

/// Starts an ambassador that cannot bind, and returns its last words.
fn refused(routes: &[String]) -> Result<Finished> {
    let launch = Launch::new(&Place::here())?;
    let refused = routes.iter().fold(launch, Launch::route).spawn()?.process.finish(SOON)?;
    ensure!(refused.code() == Some(1), "it ended with {}: {}", refused.status, refused.stderr);
    Ok(refused)
}

fn mode(path: &Path) -> Result<u32> {
    let found = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
    ensure!(found.file_type().is_socket(), "{} is no socket", path.display());
    Ok(found.permissions().mode() & 0o7777)
}

//! What the kernel tells of connections that somebody else holds: the right figures, of every
//! connection, to any user.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;

use ambassador::sockets::{Figures, each_connection};
use ambassador_tests::address::{Address, Family};
use ambassador_tests::peer::{Listener, Peer};
use ambassador_tests::skip;
use anyhow::{Context, Result, ensure};

const ESTABLISHED: u8 = 1;
const CLOSE_WAIT: u8 = 8;

#[test]
fn an_ipv4_connection_is_found_by_its_cookie_with_the_bytes_it_moved() -> Result<()> {
    the_figures_are_right(&Listener::new(Family::Tcp)?)
}

#[test]
fn an_ipv6_connection_is_found_by_its_cookie_with_the_bytes_it_moved() -> Result<()> {
    let Ok(listener) = Address::from(SocketAddr::from((Ipv6Addr::LOCALHOST, 0))).listen() else {
        skip!("there is no ::1 to listen on");
    };
    the_figures_are_right(&listener)
}

#[test]
fn an_ipv4_connection_of_an_ipv6_socket_is_found() -> Result<()> {
    let Ok(listener) = Address::from(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))).listen() else {
        skip!("there is no IPv6 to listen on");
    };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, listener.address().tcp()?.port()));
    let client = Address::from(address).connect()?;
    let server = listener.accept()?;
    carry(&client, &server, 3)?;
    ensure!(figures_of(&server)?.bytes_received == 3, "{:?}", figures_of(&server)?);
    Ok(())
}

#[test]
fn more_connections_than_one_part_of_the_answer_holds_are_all_found() -> Result<()> {
    let listener = Listener::new(Family::Tcp)?;
    let mut missing = HashMap::new();
    for count in 1..=150 {
        let client = listener.address().connect()?;
        let server = listener.accept()?;
        carry(&client, &server, count)?;
        missing.insert(server.socket().cookie()?, (count, client, server));
    }
    let mut wrong = Vec::new();
    each_connection(|figures| {
        if let Some((count, ..)) = missing.remove(&figures.cookie)
            && figures.bytes_received != count as u64
        {
            wrong.push((count, figures));
        }
    })?;
    ensure!(missing.is_empty(), "{} connections were not found", missing.len());
    ensure!(wrong.is_empty(), "{wrong:?}");
    Ok(())
}

#[test]
fn the_figures_are_told_to_any_user() -> Result<()> {
    const NOBODY: libc::uid_t = 65_534;
    let listener = Listener::new(Family::Tcp)?;
    let client = listener.address().connect()?;
    let server = listener.accept()?;
    carry(&client, &server, 3)?;
    // The bare system call is of this thread alone, which loses root's capabilities by it. Who is not
    // root has none to lose.
    let by_nobody = || {
        // SAFETY: the call takes numbers and touches no memory.
        unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
        // SAFETY: as above.
        let user = unsafe { libc::geteuid() };
        ensure!(user != 0, "still root");
        figures_of(&server)
    };
    let figures = thread::scope(|scope| scope.spawn(by_nobody).join().expect("no panic"))?;
    ensure!(figures.bytes_received == 3, "{figures:?}");
    Ok(())
}

/// Each end's bytes, while the connection is open and after one end has finished.
fn the_figures_are_right(listener: &Listener) -> Result<()> {
    let client = listener.address().connect()?;
    let server = listener.accept()?;
    // What is sent back carries the acknowledgement of all that has been read: no figure is in doubt.
    carry(&client, &server, 20_000)?;
    carry(&server, &client, 14_000)?;
    let figures = figures_of(&client)?;
    let bytes = (figures.bytes_acked, figures.bytes_received);
    ensure!(bytes == (1 + 20_000, 14_000), "the SYN counts, and every byte: {figures:?}");
    ensure!(figures.state == ESTABLISHED, "{figures:?}");
    ensure!((1..1_000_000).contains(&figures.rtt_us), "{figures:?}");
    ensure!(figures.total_retrans < 100, "{figures:?}");

    carry(&client, &server, 5)?;
    let figures = figures_of(&server)?;
    let bytes = (figures.bytes_acked, figures.bytes_received);
    ensure!(bytes == (14_000, 20_005), "the end that accepted: {figures:?}");

    client.finish()?;
    server.hear_end()?;
    let figures = figures_of(&server)?;
    ensure!(figures.state == CLOSE_WAIT, "{figures:?}");
    ensure!(figures.bytes_received == 20_005 + 1, "the FIN counts: {figures:?}");
    Ok(())
}

/// Few enough bytes that one end can send them all before the other reads them.
fn carry(from: &Peer, to: &Peer, count: usize) -> Result<()> {
    from.say(&vec![7; count])?;
    to.hear(count)?;
    Ok(())
}

fn figures_of(peer: &Peer) -> Result<Figures> {
    let cookie = peer.socket().cookie().context("ask for a socket's cookie")?;
    let mut found = None;
    each_connection(|figures| found = found.or((figures.cookie == cookie).then_some(figures)))?;
    found.context("find the connection among those of the kernel")
}

//! Connecting: by every kind of socket, once and again, and what the app is told of it.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use ambassador_tests::address::{Address, Family};
use ambassador_tests::peer::{Listener, Peer, turn_on};
use ambassador_tests::place::Place;
use ambassador_tests::readiness::Readiness;
use ambassador_tests::wait::{SOON, until};
use ambassador_tests::way::{Way, Wire};
use ambassador_tests::{on_every_way, skip};
use anyhow::{Context, Result, bail, ensure};
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};
use rustix::event::epoll::EventFlags;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

on_every_way! { tcp: Tcp;
    server_sees_the_client_itself_where_nobody_is_between,
    peer_name_is_the_address_that_was_asked_for,
    v4_mapped_address_is_reached,
    bound_source_is_kept,
    bound_device_is_kept,
    multipath_socket_connects,
    data_may_come_with_the_connection,
    data_may_come_in_the_first_packet,
    connecting_need_not_block,
    refusal_is_told_at_once,
    refusal_is_told_to_who_does_not_block,
    socket_may_try_again_after_a_refusal,
    socket_may_disconnect_and_connect_elsewhere,
    io_uring_connects,
}

on_every_way! { tcp6: Tcp6;
    server_sees_the_client_itself_where_nobody_is_between,
    peer_name_is_the_address_that_was_asked_for,
    v6_only_socket_connects,
    v6_client_reaches_a_v4_server,
    connecting_need_not_block,
    refusal_is_told_at_once,
    socket_may_disconnect_and_connect_elsewhere,
}

/// A socket of the kind that the wire's clients have.
fn socket(wire: &Wire) -> Result<Socket> {
    let domain = Domain::for_address(wire.road.address.tcp()?);
    Socket::new(domain, Type::STREAM, None).context("open a socket")
}

/// Where the wire's clients connect to.
fn target(wire: &Wire) -> Result<SockAddr> {
    Ok(wire.road.address.tcp()?.into())
}

/// Expects the app to believe that it is connected to this address.
fn is_named(socket: &Socket, address: &Address) -> Result<()> {
    let name = socket.peer_addr().context("ask for the peer's name")?;
    let name: Address = name.as_socket().context("read the peer's name")?.into();
    ensure!(name == *address, "connected to {address}, but named {name}");
    Ok(())
}

/// Expects a connected socket to reach the wire's server.
fn reaches_the_server(wire: &Wire, socket: Socket) -> Result<()> {
    let client = Peer::of(socket)?;
    let server = wire.listener.accept()?;
    client.say(b"question")?;
    ensure!(server.hear(8)? == b"question");
    server.say(b"answer")?;
    ensure!(client.hear(6)? == b"answer");
    client.finish()?;
    server.hear_end()
}

/// Expects that the hooks have left the wire's only connection to the listener, where there are hooks.
fn is_left_to_the_listener(wire: &Wire) -> Result<()> {
    let (Way::Direct, Some(ambassador)) = (wire.road.way, &wire.road.ambassador) else {
        return Ok(());
    };
    let told = until("word of the connection", SOON, || {
        let told = ambassador.connections()?;
        Ok((!told.is_empty()).then_some(told))
    })?;
    ensure!(told.len() == 1 && told[0]["tier"] != "direct", "{told:?}");
    Ok(())
}

/// The port that an app's own connection leads to, whatever the app is told.
fn far_port(socket: &Socket) -> Result<u16> {
    let link = format!("/proc/self/fd/{}", socket.as_raw_fd());
    let inode = fs::metadata(&link).with_context(|| format!("look at {link}"))?.ino().to_string();
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(fs::read_to_string);
    let tables = tables.into_iter().flatten().collect::<String>();
    let mut rows = tables.lines().map(|row| row.split_whitespace().collect::<Vec<_>>());
    let row = rows.find(|row| row.get(9) == Some(&inode.as_str()));
    let row = row.with_context(|| format!("find socket {inode} in /proc/net"))?;
    let (_, port) = row[2].split_once(':').context("find the port of the far end")?;
    u16::from_str_radix(port, 16).context("parse the port of the far end")
}

/// Whether the app's own connection ends at the server, so that it is told what the server says of it.
fn is_native(wire: &Wire) -> bool {
    matches!(wire.road.way, Way::Unproxied | Way::Direct)
}

/// Makes the wire's server refuse connections.
fn stop_listening(wire: &Wire) -> Result<()> {
    wire.listener.socket().shutdown(std::net::Shutdown::Both).context("stop listening")
}

fn is_refused(outcome: &io::Result<()>) -> bool {
    outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

/// Also proves that the other tests are about the way that they name.
fn server_sees_the_client_itself_where_nobody_is_between(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    // Not by who the server sees alone: a relay may have the client's own port there, by chance.
    let (ends_at, server_is_at) = (far_port(client.socket())?, wire.listener.address().port()?);
    ensure!((ends_at == server_is_at) == is_native(wire), "{ends_at} for {server_is_at}");
    if is_native(wire) {
        let source = client.socket().local_addr().context("ask for the client's address")?;
        let seen = server.socket().peer_addr().context("ask for who the server sees")?;
        ensure!(source.as_socket() == seen.as_socket(), "{source:?}, {seen:?}");
    }
    Ok(())
}

fn peer_name_is_the_address_that_was_asked_for(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    is_named(client.socket(), &wire.road.address)?;
    // The name lasts as long as the connection.
    server.finish()?;
    client.hear_end()?;
    is_named(client.socket(), &wire.road.address)
}

/// As runtimes connect that open every socket for IPv6 (Java, for one).
fn v4_mapped_address_is_reached(wire: &Wire) -> Result<()> {
    let mapped = IpAddr::from(Ipv4Addr::LOCALHOST.to_ipv6_mapped());
    let mapped = SocketAddr::new(mapped, wire.road.address.port()?);
    let socket = match Socket::new(Domain::IPV6, Type::STREAM, None) {
        Ok(socket) => socket,
        Err(error) => skip!("there is no IPv6 here: {error}"),
    };
    socket.connect(&mapped.into()).context("connect to a mapped address")?;
    is_named(&socket, &mapped.into())?;
    reaches_the_server(wire, socket)
}

fn bound_source_is_kept(wire: &Wire) -> Result<()> {
    let socket = socket(wire)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).context("bind the source")?;
    let source = socket.local_addr().context("ask for the source")?;
    socket.connect(&target(wire)?).context("connect from a bound source")?;
    ensure!(socket.local_addr().context("ask for the source")? == source);
    is_named(&socket, &wire.road.address)?;
    is_left_to_the_listener(wire)?;
    reaches_the_server(wire, socket)
}

fn bound_device_is_kept(wire: &Wire) -> Result<()> {
    let socket = socket(wire)?;
    socket.bind_device(Some(b"lo")).context("bind to the loopback device")?;
    socket.connect(&target(wire)?).context("connect by a bound device")?;
    is_left_to_the_listener(wire)?;
    reaches_the_server(wire, socket)
}

fn multipath_socket_connects(wire: &Wire) -> Result<()> {
    let socket = match Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)) {
        Ok(socket) => socket,
        Err(error) => skip!("Multipath TCP cannot be had here: {error}"),
    };
    socket.connect(&target(wire)?).context("connect a multipath socket")?;
    is_named(&socket, &wire.road.address)?;
    is_left_to_the_listener(wire)?;
    reaches_the_server(wire, socket)
}

fn data_may_come_with_the_connection(wire: &Wire) -> Result<()> {
    fast_open(wire, socket(wire)?)
}

/// Without a cookie the first packet has data in it for sure, whatever becomes of them.
fn data_may_come_in_the_first_packet(wire: &Wire) -> Result<()> {
    let socket = socket(wire)?;
    turn_on(&socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_NO_COOKIE)?;
    fast_open(wire, socket)
}

fn fast_open(wire: &Wire, socket: Socket) -> Result<()> {
    let sent = socket
        .send_to_with_flags(b"early, ", &target(wire)?, libc::MSG_FASTOPEN)
        .context("send and connect at once")?;
    ensure!(sent == 7, "{sent} bytes were sent");
    let client = Peer::of(socket)?;
    client.say(b"and late")?;
    client.finish()?;
    let server = wire.listener.accept()?;
    ensure!(server.hear_to_end()? == b"early, and late");
    server.say(b"answer")?;
    drop(server);
    ensure!(client.hear_to_end()? == b"answer");
    Ok(())
}

fn connecting_need_not_block(wire: &Wire) -> Result<()> {
    let socket = socket(wire)?;
    socket.set_nonblocking(true).context("make a socket non-blocking")?;
    let begun = socket.connect(&target(wire)?);
    ensure!(
        begun.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EINPROGRESS)),
        "{begun:?} and not EINPROGRESS"
    );
    let readiness = Readiness::of(&socket, EventFlags::OUT)?;
    readiness.within(SOON)?.context("not told that the connection is there")?;
    ensure!(socket.take_error().context("ask for a socket's error")?.is_none());
    let again = socket.connect(&target(wire)?);
    ensure!(
        again.is_ok()
            || again.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EISCONN)),
        "{again:?} on a connected socket"
    );
    reaches_the_server(wire, socket)
}

fn refusal_is_told_at_once(wire: &Wire) -> Result<()> {
    stop_listening(wire)?;
    let socket = socket(wire)?;
    let outcome = socket.connect(&target(wire)?);
    if is_native(wire) {
        ensure!(is_refused(&outcome), "{outcome:?} where nobody listens");
    } else {
        outcome.context("connect to a relay")?;
        if wire.road.way == Way::Sockmap {
            // There, any wake-up ends a blocking read: see `wait.rs`.
            socket.set_nonblocking(true).context("make a socket non-blocking")?;
        }
        Peer::of(socket)?.hear_reset()?;
    }
    Ok(())
}

fn refusal_is_told_to_who_does_not_block(wire: &Wire) -> Result<()> {
    stop_listening(wire)?;
    let socket = socket(wire)?;
    socket.set_nonblocking(true).context("make a socket non-blocking")?;
    match socket.connect(&target(wire)?) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        begun => bail!("{begun:?} and not EINPROGRESS"),
    }
    // An end of a connection, and a connection that never was, can be read.
    Readiness::of(&socket, EventFlags::IN)?.within(SOON)?.context("told nothing")?;
    let error = socket.take_error().context("ask for a socket's error")?;
    let expected = match is_native(wire) {
        true => ErrorKind::ConnectionRefused,
        false => ErrorKind::ConnectionReset,
    };
    ensure!(error.as_ref().is_some_and(|it| it.kind() == expected), "{error:?}: {expected:?}");
    Ok(())
}

fn socket_may_try_again_after_a_refusal(wire: &Wire) -> Result<()> {
    let nowhere = SocketAddr::from((Ipv4Addr::LOCALHOST, Place::here().port()?));
    let down = Wire::new(wire.road.way, Family::Tcp)?;
    stop_listening(&down)?;
    let socket = socket(wire)?;
    // A relay's client is refused by nobody where a route is.
    let refusing = [Some(nowhere.into()), is_native(wire).then_some(target(&down)?)];
    for address in refusing.iter().flatten().cycle().take(4) {
        let outcome = socket.connect(address);
        ensure!(is_refused(&outcome), "{outcome:?} where nobody listens");
    }
    socket.connect(&target(wire)?).context("connect after a refusal")?;
    is_named(&socket, &wire.road.address)?;
    reaches_the_server(wire, socket)
}

/// What was remembered of the first connection must not be told of the second.
fn socket_may_disconnect_and_connect_elsewhere(wire: &Wire) -> Result<()> {
    let elsewhere = match wire.road.address.tcp()?.ip() {
        IpAddr::V4(_) => Listener::new(Family::Tcp)?,
        IpAddr::V6(_) => Listener::new(Family::Tcp6)?,
    };
    let socket = socket(wire)?;
    for _ in 0..3 {
        for (address, listener) in
            [(&wire.road.address, &wire.listener), (elsewhere.address(), &elsewhere)]
        {
            socket
                .connect(&address.tcp()?.into())
                .with_context(|| format!("connect to {address}"))?;
            is_named(&socket, address)?;
            let server = listener.accept()?;
            ensure!(socket.send(b"hello").context("send")? == 5);
            ensure!(server.hear(5)? == b"hello");
            rustix::net::connect_unspec(&socket).context("disconnect")?;
            server.hear_reset()?;
        }
    }
    Ok(())
}

fn io_uring_connects(wire: &Wire) -> Result<()> {
    let mut ring = match IoUring::new(8) {
        Ok(ring) => ring,
        Err(error) => skip!("io_uring cannot be had here: {error}"),
    };
    let socket = socket(wire)?;
    // For ever: an operation that a failing test leaves behind must not find it gone.
    let target: &SockAddr = Box::leak(Box::new(target(wire)?));
    let connect =
        opcode::Connect::new(Fd(socket.as_raw_fd()), target.as_ptr().cast(), target.len()).build();
    // SAFETY: the address it points to lives for ever.
    unsafe { ring.submission().push(&connect) }.context("queue an operation")?;
    let limit = Timespec::from(SOON);
    let limit = SubmitArgs::new().timespec(&limit);
    ring.submitter().submit_with_args(1, &limit).context("wait for an operation")?;
    let done = ring.completion().next().context("the connection did not complete")?;
    ensure!(done.result() == 0, "{}", io::Error::from_raw_os_error(-done.result()));
    reaches_the_server(wire, socket)
}

fn v6_only_socket_connects(wire: &Wire) -> Result<()> {
    let socket = socket(wire)?;
    socket.set_only_v6(true).context("set IPV6_V6ONLY")?;
    socket.connect(&target(wire)?).context("connect by IPv6 only")?;
    reaches_the_server(wire, socket)
}

fn v6_client_reaches_a_v4_server(wire: &Wire) -> Result<()> {
    let way = wire.road.way;
    if way == Way::Unproxied {
        // It takes an ambassador.
        return Ok(());
    }
    let mixed = Wire::between(way, Family::Tcp6, Family::Tcp)?;
    v6_only_socket_connects(&mixed).context("with IPV6_V6ONLY")?;
    let (client, _server) = mixed.pair()?;
    is_named(client.socket(), &mixed.road.address)
}

//! The `sockmap` tier from inside: which clients are taken, what passes user space by, what is held back,
//! and how a connection is given back. What it owes a connection is told by `relay.rs`, on every way.

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::thread::scope;
use std::time::Duration;

use ambassador::config::InFlight;
use ambassador::datapath::obstacle;
use ambassador::datapath::sockmap::Enrol;
use ambassador_tests::address::Family;
use ambassador_tests::noise::Noise;
use ambassador_tests::peer::Peer;
use ambassador_tests::skip;
use ambassador_tests::wait::{SOON, until, until_true};
use ambassador_tests::way::{Way, Wire};
use anyhow::{Context, Result, ensure};

use tier::{Blocking, Tier};

const MIB: usize = 1 << 20;
const BYTES: u32 = 1 << 20;
const MESSAGES: u32 = 2048;

fn limits(bytes: u32) -> Result<InFlight> {
    let bytes = bytes.try_into().context("a budget is not 0")?;
    Ok(InFlight { bytes, messages: MESSAGES.try_into().context("a limit is not 0")? })
}

/// Ends the calling test where its means are not there.
macro_rules! tier {
    ($clients:expr) => {
        tier!($clients, BYTES)
    };
    ($clients:expr, $bytes:expr) => {{
        if let Err(obstacle) = obstacle::to_load() {
            skip!("{obstacle}");
        }
        Tier::new($clients, limits($bytes)?)?
    }};
}

mod inflight;
mod ktls;
mod lowered;
mod prospect;
mod reset;
mod stranger;
mod tier;
mod zerocopy;

#[test]
fn most_bytes_of_a_latched_client_pass_user_space_by() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let connection = tier.connect(Blocking::No)?;
    let shortcut = connection.shortcut()?;
    const PIECE: usize = 64 << 10;
    for seed in 0..128 {
        connection.say_up(&Noise::new(seed).bytes(PIECE))?;
    }
    let carried = shortcut.carried();
    ensure!(carried >= 100 * PIECE as u64, "only {carried} bytes took the shortcut");
    connection.ends_well(128 * PIECE as u64)
}

/// Sizes around every boundary, and sends that are taken in part.
#[test]
fn sends_taken_in_part_are_counted_exactly() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let connection = tier.connect(Blocking::No)?;
    connection.client.socket().set_send_buffer_size(64 << 10).context("set a send buffer")?;
    const LENGTH: usize = 48 * MIB;
    scope(|scope| {
        let sending = scope.spawn(|| -> Result<usize> {
            let (mut noise, mut rhythm, mut partial) = (Noise::new(2), Noise::new(3), 0);
            let mut left = LENGTH;
            while left > 0 {
                let largest = 1 << rhythm.below(22);
                let bytes = noise.bytes(left.min(1 + rhythm.below(largest) as usize));
                left -= bytes.len();
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let sent = (&connection.client).write(rest).context("send")?;
                    partial += usize::from(0 < sent && sent < rest.len());
                    rest = &rest[sent..];
                }
            }
            Ok(partial)
        });
        let mut rhythm = Noise::new(4);
        let mut noise = Noise::new(2);
        let mut left = LENGTH;
        while left > 0 {
            let piece = left.min(1 + rhythm.below(2 * MIB as u64) as usize);
            connection.server.hear_noise(&mut noise, piece)?;
            left -= piece;
            if rhythm.below(4) == 0 {
                // The rhythm is what is tested: nothing waits for it.
                std::thread::sleep(Duration::from_micros(rhythm.below(3000)));
            }
        }
        let partial = sending.join().expect("the sender does not panic")?;
        ensure!(partial > 0, "every send was taken whole");
        Ok(())
    })?;
    ensure!(connection.shortcut()?.carried() > 0, "nothing took the shortcut");
    connection.ends_well(LENGTH as u64)
}

/// Its order is what a connection is owed first: bytes too many for the budget are with the relay, which
/// stands still, and those that come after them would fit.
#[test]
fn nothing_overtakes_what_the_relay_still_owes() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed, 4096);
    let connection = tier.connect(Blocking::No)?;
    connection.until_latched()?;
    let carried = connection.shortcut()?.carried();
    let (first, second) = (Noise::new(7).bytes(8192), b"second".to_vec());
    let stopped = tier.stop_relays()?;
    connection.client.say(&first)?;
    connection.client.say(&second)?;
    ensure!(connection.shortcut()?.carried() == carried, "later bytes took the shortcut");
    drop(stopped);
    ensure!(connection.server.hear(8192 + 6)? == [first, second].concat());
    connection.until_latched()
}

#[test]
fn stalled_upstream_is_sent_no_more_than_the_budget() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let connection = tier.connect(Blocking::No)?;
    let shortcut = connection.shortcut()?;
    let mut noise = Noise::new(5);
    let taken = connection.client.say_until_held_back(&mut noise)?;
    // What the server's socket has acknowledged without a reader is in flight no more.
    let acknowledged = waiting(&connection.server)?;
    let carried = shortcut.carried();
    ensure!(
        carried > 0 && carried <= u64::from(BYTES) + acknowledged,
        "{carried} bytes were carried"
    );
    ensure!(taken as u64 > carried, "what was held back did not take the native way");
    scope(|scope| {
        let sending = scope.spawn(|| connection.client.say_noise(&mut noise, 4 * MIB));
        connection.server.hear_noise(&mut Noise::new(5), taken + 4 * MIB)?;
        sending.join().expect("the sender does not panic")
    })?;
    // Once everything is acknowledged, it latches again.
    connection.until_latched()
}

/// As it would grow and shrink with the path.
#[test]
fn budget_follows_the_upstream_socket_s_buffer() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let connection = tier.connect(Blocking::No)?;
    connection.until_latched()?;
    connection.upstream.set_send_buffer_size(48 << 10).context("narrow the upstream's socket")?;
    let buffer = connection.upstream.send_buffer_size()? as u64;
    // The kernel half looks at it when something is acknowledged.
    connection.until_latched()?;
    let shortcut = connection.shortcut()?;
    connection.client.say_until_held_back(&mut Noise::new(12))?;
    let (carried, acknowledged) = (shortcut.carried(), waiting(&connection.server)?);
    ensure!(
        carried <= buffer / 2 + acknowledged,
        "{carried} bytes were carried, {acknowledged} acknowledged, with a buffer of {buffer}"
    );
    Ok(())
}

#[test]
fn upstream_socket_s_buffer_may_grow() -> Result<()> {
    const SO_BUF_LOCK: libc::c_int = 72;
    let tier = tier!(Enrol::Unnoticed);
    let connection = tier.connect(Blocking::No)?;
    connection.shortcut()?;
    let (mut locked, mut length): (libc::c_int, libc::socklen_t) = (-1, 4);
    // SAFETY: the pointers lead to an int and to its length.
    let failed = unsafe {
        libc::getsockopt(
            connection.upstream.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_BUF_LOCK,
            (&raw mut locked).cast(),
            &raw mut length,
        )
    };
    ensure!(failed == 0, "{}", std::io::Error::last_os_error());
    ensure!(locked == 0, "it keeps its size: {locked}");
    Ok(())
}

#[test]
fn messages_in_flight_are_bounded_too() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    // With a small window, acknowledgements stop long before the budget of bytes is used up.
    let connection = tier.connect_with(&tier.listener, Blocking::No, Some(1), |_| Ok(()))?;
    let shortcut = connection.shortcut()?;
    let sent = 8 * u64::from(MESSAGES);
    for _ in 0..sent {
        connection.client.say(b".")?;
    }
    let (acknowledged, carried) = (waiting(&connection.server)?, shortcut.carried());
    ensure!(
        carried > 0 && carried <= acknowledged + u64::from(MESSAGES) * 9 / 8,
        "{carried} messages were carried, {acknowledged} of them acknowledged"
    );
    ensure!(connection.server.hear(sent as usize)?.iter().all(|byte| *byte == b'.'));
    connection.ends_well(sent)
}

#[test]
fn blocking_client_is_left_alone() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let connection = tier.connect(Blocking::Yes)?;
    ensure!(connection.traffic.shortcut.get().is_none(), "a blocking client was enrolled");
    connection.say_up(b"hello")?;
    until_true("the bytes to be counted", || Ok(connection.traffic.up() == 5))
}

#[test]
fn blocking_client_is_taken_where_the_route_asks_for_it() -> Result<()> {
    let tier = tier!(Enrol::Anybody);
    let connection = tier.connect(Blocking::Yes)?;
    connection.until_latched()
}

#[test]
fn client_of_another_listener_is_left_alone() -> Result<()> {
    let tier = tier!(Enrol::Anybody);
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("bind a listener")?;
    let connection = tier.connect_to(&other, Blocking::No)?;
    ensure!(connection.traffic.shortcut.get().is_none(), "a stranger's client was enrolled");
    Ok(())
}

#[test]
fn client_that_turns_blocking_gets_an_ordinary_socket_back() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let connection = tier.connect(Blocking::No)?;
    connection.until_latched()?;
    let shortcut = connection.shortcut()?;
    let carried = shortcut.carried();
    connection.client.socket().set_nonblocking(false).context("make a client blocking")?;
    // Passed natively, and the relay takes notice when it forwards it.
    connection.say_up(b"blocking now")?;
    connection.say_up(b"and again")?;
    ensure!(shortcut.carried() == carried, "a blocking client's bytes took the shortcut");
    // In a sockmap, waiting bytes are not counted.
    connection.server.say(b"reply")?;
    until("the reply to be counted", SOON, || Ok((waiting(&connection.client)? == 5).then_some(())))
}

#[test]
fn shortcut_may_be_closed_in_mid_stream() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let connection = tier.connect(Blocking::No)?;
    let shortcut = connection.shortcut()?;
    const LENGTH: usize = 32 * MIB;
    let closed = scope(|scope| {
        let sending = scope.spawn(|| connection.client.say_noise(&mut Noise::new(6), LENGTH));
        let mut noise = Noise::new(6);
        connection.server.hear_noise(&mut noise, LENGTH / 2)?;
        shortcut.close();
        connection.server.hear_noise(&mut noise, LENGTH / 2 - MIB)?;
        let closed = shortcut.carried();
        connection.server.hear_noise(&mut noise, MIB)?;
        sending.join().expect("the sender does not panic")?;
        anyhow::Ok(closed)
    })?;
    connection.say_up(b"still here")?;
    ensure!(closed > 0, "nothing took the shortcut before it was closed");
    ensure!(shortcut.carried() == closed, "bytes took a shortcut that is closed");
    connection.ends_well(LENGTH as u64 + 10)
}

#[test]
fn closed_shortcut_takes_no_further_byte() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let connection = tier.connect(Blocking::No)?;
    connection.until_latched()?;
    let shortcut = connection.shortcut()?;
    let carried = shortcut.carried();
    shortcut.close();
    connection.say_up(b"the long way")?;
    ensure!(shortcut.carried() == carried, "bytes took a shortcut that is closed");
    Ok(())
}

#[test]
fn latched_traffic_does_not_wake_the_relay() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let connection = tier.connect(Blocking::No)?;
    connection.until_latched()?;
    const MESSAGES: u64 = 2000;
    let before = tier.wake_ups()?;
    for _ in 0..MESSAGES {
        connection.say_up(b"nobody else needs to know")?;
    }
    let woken = tier.wake_ups()? - before;
    ensure!(woken < MESSAGES / 20, "{MESSAGES} latched messages woke the relay {woken} times");
    Ok(())
}

#[test]
fn two_hundred_connections_at_once() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let connections = (0..200).map(|_| tier.connect(Blocking::No)).collect::<Result<Vec<_>>>()?;
    const LENGTH: usize = 200_000;
    // Every client has sent before any server reads, so that all flows are under way together.
    for (seed, connection) in connections.iter().enumerate() {
        connection.client.say_noise(&mut Noise::new(seed as u64), LENGTH)?;
    }
    for (seed, connection) in connections.iter().enumerate() {
        connection
            .server
            .hear_noise(&mut Noise::new(seed as u64), LENGTH)
            .with_context(|| format!("connection {seed}"))?;
        ensure!(connection.shortcut()?.carried() > 0, "connection {seed} was never latched");
    }
    connections.into_iter().try_for_each(|it| it.ends_well(LENGTH as u64))
}

#[test]
fn route_may_be_limited_to_another_tier_in_mid_stream() -> Result<()> {
    if let Some(obstacle) = Way::Sockmap.obstacle(Family::Tcp)? {
        skip!("{obstacle}");
    }
    let wire = Wire::new(Way::Sockmap, Family::Tcp)?;
    let ambassador = wire.road.ambassador.as_ref().context("find the ambassador")?;
    let (client, server) = wire.pair()?;
    const LENGTH: usize = 32 * MIB;
    scope(|scope| {
        let sending = scope.spawn(|| client.say_noise(&mut Noise::new(9), LENGTH));
        let mut noise = Noise::new(9);
        server.hear_noise(&mut noise, LENGTH / 2)?;
        ambassador.command(&["tier", "road", "splice"])?;
        server.hear_noise(&mut noise, LENGTH / 2)?;
        sending.join().expect("the sender does not panic")
    })?;
    let (next, its_server) = wire.pair()?;
    drop((next, its_server));
    until_true("the record of a connection that was not enrolled", || {
        Ok(!ambassador.access_records("tier", "splice")?.is_empty())
    })?;
    drop((client, server));
    until_true("the record of the first connection", || {
        let records = ambassador.access_records("tier", "sockmap")?;
        Ok(records.iter().any(|record| record["bytes_up"] == LENGTH))
    })
}

/// Bytes that wait to be read.
fn waiting(peer: &Peer) -> Result<u64> {
    rustix::io::ioctl_fionread(peer.socket()).context("count waiting bytes")
}

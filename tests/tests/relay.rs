//! What a connection owes its two ends. Each behaviour is expected of a direct connection and of
//! each relay, on TCP and, where it has a meaning there, on Unix sockets.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::Family;
use ambassador_tests::noise::Noise;
use ambassador_tests::on_every_way;
use ambassador_tests::peer::Peer;
use ambassador_tests::way::{Way, Wire};

const MIB: usize = 1 << 20;
/// Little enough to be taken without a reader, by a Unix socket too; more than one buffer.
const UNREAD: usize = 100_000;

on_every_way! { tcp: Tcp;
    server_may_speak_first,
    client_may_half_close,
    server_may_half_close,
    ends_may_come_in_any_order,
    data_before_close_is_delivered,
    single_bytes_are_passed_on_at_once,
    slow_writer_is_heard_piece_by_piece,
    slow_reader_holds_back_the_client,
    slow_reader_holds_back_the_server,
    large_upload_arrives_intact,
    large_download_arrives_intact,
    both_directions_may_be_busy_at_once,
    many_short_connections,
    reset_by_client_reaches_server,
    reset_by_server_reaches_client,
    reset_after_half_close_reaches_a_silent_server,
    reset_after_half_close_reaches_a_silent_client,
    reset_reaches_a_server_that_does_not_read,
    reset_reaches_a_client_that_does_not_read,
    reset_by_a_server_stops_a_client_that_writes,
    data_after_close_resets_the_client,
    reset_leaves_nothing_for_the_next_connection,
}

on_every_way! { unix: Unix;
    server_may_speak_first,
    client_may_half_close,
    server_may_half_close,
    ends_may_come_in_any_order,
    data_before_close_is_delivered,
    single_bytes_are_passed_on_at_once,
    slow_writer_is_heard_piece_by_piece,
    slow_reader_holds_back_the_client,
    slow_reader_holds_back_the_server,
    large_upload_arrives_intact,
    large_download_arrives_intact,
    both_directions_may_be_busy_at_once,
    many_short_connections,
}

fn server_may_speak_first(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    server.say(b"220 welcome\r\n")?;
    ensure!(client.hear(13)? == b"220 welcome\r\n");
    client.say(b"QUIT\r\n")?;
    ensure!(server.hear(6)? == b"QUIT\r\n");
    Ok(())
}

fn client_may_half_close(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    client.say(b"question")?;
    client.finish()?;
    ensure!(server.hear_to_end()? == b"question");
    server.say_noise(&mut Noise::new(1), UNREAD)?;
    drop(server);
    client.hear_noise(&mut Noise::new(1), UNREAD)?;
    client.hear_end()
}

fn server_may_half_close(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    server.say(b"all I have")?;
    server.finish()?;
    ensure!(client.hear_to_end()? == b"all I have");
    client.say_noise(&mut Noise::new(2), UNREAD)?;
    drop(client);
    server.hear_noise(&mut Noise::new(2), UNREAD)?;
    server.hear_end()
}

fn ends_may_come_in_any_order(wire: &Wire) -> Result<()> {
    let say_and_finish = |peer: &Peer, words: &[u8]| peer.say(words).and_then(|()| peer.finish());

    let (client, server) = wire.pair()?;
    say_and_finish(&client, b"first")?;
    say_and_finish(&server, b"second, before the first was read")?;
    ensure!(client.hear_to_end()? == b"second, before the first was read");
    ensure!(server.hear_to_end()? == b"first");

    let (client, server) = wire.pair()?;
    server.finish()?;
    client.say(b"still talking")?;
    ensure!(server.hear(13)? == b"still talking");
    client.hear_end()?;
    say_and_finish(&client, b"done")?;
    ensure!(server.hear_to_end()? == b"done");

    let (client, server) = wire.pair()?;
    client.finish()?;
    server.finish()?;
    client.hear_end()?;
    server.hear_end()
}

fn data_before_close_is_delivered(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    server.say_noise(&mut Noise::new(3), UNREAD)?;
    drop(server);
    client.hear_noise(&mut Noise::new(3), UNREAD)?;
    client.hear_end()?;

    let (client, server) = wire.pair()?;
    client.say_noise(&mut Noise::new(4), UNREAD)?;
    drop(client);
    server.hear_noise(&mut Noise::new(4), UNREAD)?;
    server.hear_end()
}

fn single_bytes_are_passed_on_at_once(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    for byte in (0..=u8::MAX).cycle().take(2000) {
        client.say(&[byte])?;
        ensure!(server.hear(1)? == [byte]);
        server.say(&[!byte])?;
        ensure!(client.hear(1)? == [!byte]);
    }
    Ok(())
}

fn slow_writer_is_heard_piece_by_piece(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    let mut noise = Noise::new(5);
    for pause in 0..20 {
        let piece = noise.bytes(1 + pause * 37);
        client.say(&piece)?;
        ensure!(server.hear(piece.len())? == piece);
        // The slowness is what is tested here.
        std::thread::sleep(Duration::from_millis(pause as u64 * 2));
        server.say(&piece)?;
        ensure!(client.hear(piece.len())? == piece);
    }
    Ok(())
}

fn slow_reader_holds_back_the_client(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    slow_reader_holds_back(wire, &client, &server)
}

fn slow_reader_holds_back_the_server(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    slow_reader_holds_back(wire, &server, &client)
}

fn slow_reader_holds_back(wire: &Wire, writer: &Peer, reader: &Peer) -> Result<()> {
    let rss = || wire.road.ambassador.as_ref().map_or(Ok(0), |ambassador| ambassador.process.rss());
    let before = rss()?;
    let mut said = Noise::new(6);
    let taken = writer.say_until_held_back(&mut said)?;
    // What the kernel holds for two sockets, twice; more is a relay that swallows.
    ensure!(taken < 48 * MIB, "{taken} bytes were taken though nobody read");
    let grown = rss()?.saturating_sub(before);
    ensure!(grown < 4 << 20, "the ambassador grew by {grown} bytes for one slow reader");

    const REST: usize = 4 * MIB;
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            writer.say_noise(&mut said, REST)?;
            writer.finish()
        });
        reader.hear_noise(&mut Noise::new(6), taken + REST)?;
        reader.hear_end()?;
        writing.join().expect("the writer does not panic")
    })
}

fn large_upload_arrives_intact(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    arrives_intact(&client, &server, 7, 32 * MIB)
}

fn large_download_arrives_intact(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    arrives_intact(&server, &client, 8, 32 * MIB)
}

fn both_directions_may_be_busy_at_once(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    std::thread::scope(|scope| {
        let up = scope.spawn(|| arrives_intact(&client, &server, 9, 16 * MIB));
        arrives_intact(&server, &client, 10, 16 * MIB).context("down")?;
        up.join().expect("the upload does not panic").context("up")
    })
}

fn arrives_intact(from: &Peer, to: &Peer, seed: u64, length: usize) -> Result<()> {
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            from.say_noise(&mut Noise::new(seed), length)?;
            from.finish()
        });
        to.hear_noise(&mut Noise::new(seed), length)?;
        to.hear_end()?;
        sending.join().expect("the sender does not panic")
    })
}

fn many_short_connections(wire: &Wire) -> Result<()> {
    for round in 0..500_u32 {
        let (client, server) = wire.pair().with_context(|| format!("connection {round}"))?;
        client.say(&round.to_be_bytes())?;
        ensure!(server.hear(4)? == round.to_be_bytes());
        server.say(&round.to_le_bytes())?;
        drop(server);
        ensure!(client.hear_to_end()? == round.to_le_bytes());
    }
    Ok(())
}

fn reset_by_client_reaches_server(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    client.say(b"hello")?;
    ensure!(server.hear(5)? == b"hello");
    client.reset()?;
    server.hear_reset()
}

fn reset_by_server_reaches_client(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    client.say(b"hello")?;
    ensure!(server.hear(5)? == b"hello");
    server.reset()?;
    client.hear_reset()
}

fn reset_after_half_close_reaches_a_silent_server(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    client.finish()?;
    server.hear_end()?;
    client.reset()?;
    server.notice_failure().map(drop)
}

fn reset_after_half_close_reaches_a_silent_client(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    server.finish()?;
    client.hear_end()?;
    server.reset()?;
    client.notice_failure().map(drop)
}

fn reset_reaches_a_server_that_does_not_read(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    client.say_until_held_back(&mut Noise::new(11))?;
    client.reset()?;
    server.notice_failure().map(drop)
}

fn reset_reaches_a_client_that_does_not_read(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    server.say_until_held_back(&mut Noise::new(12))?;
    server.reset()?;
    client.notice_failure().map(drop)
}

fn reset_by_a_server_stops_a_client_that_writes(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    client.say_until_held_back(&mut Noise::new(13))?;
    server.reset()?;
    client.notice_failure().map(drop)
}

/// A server that is gone without having read answers what comes next with a reset.
fn data_after_close_resets_the_client(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    drop(server);
    client.hear_end()?;
    client.say(b"is anybody there?")?;
    client.notice_failure().map(drop)
}

/// Buffers and pipes are used again: what a broken connection left in them must not come out.
fn reset_leaves_nothing_for_the_next_connection(wire: &Wire) -> Result<()> {
    for seed in 15..18 {
        let (client, server) = wire.pair()?;
        client.say_until_held_back(&mut Noise::new(seed))?;
        client.reset()?;
        server.notice_failure()?;
    }
    let (client, server) = wire.pair()?;
    arrives_intact(&client, &server, 18, 4 * MIB)
}

#[test]
fn client_is_closed_promptly_when_the_upstream_refuses() -> Result<()> {
    for way in Way::RELAYS {
        let Wire { listener, road } = Wire::new(way, Family::Tcp)?;
        drop(listener);
        let client = road.address.connect()?;
        client.hear_close().with_context(|| format!("by {way}"))?;
    }
    Ok(())
}

#[test]
fn families_may_differ_between_the_two_sides() -> Result<()> {
    for way in Way::RELAYS {
        for (client, server) in [(Family::Tcp, Family::Unix), (Family::Unix, Family::Tcp)] {
            let wire = Wire::between(way, client, server)?;
            both_directions_may_be_busy_at_once(&wire)?;
            client_may_half_close(&wire)?;
            server_may_half_close(&wire)?;
        }
    }
    Ok(())
}

/// Interactive traffic must not pay for pipes, and bulk must not pay for copies.
#[test]
fn splice_takes_a_pipe_for_bulk_only_and_copy_never() -> Result<()> {
    for (way, pipes_of_bulk) in [(Way::Copy, false), (Way::Splice, true)] {
        let wire = Wire::new(way, Family::Tcp)?;
        let ambassador = wire.road.ambassador.as_ref().context("find the ambassador")?;
        let pipes = || {
            let all = ambassador.process.descriptors()?;
            Ok::<_, anyhow::Error>(all.iter().filter(|it| it.starts_with("pipe:")).count())
        };
        let before = pipes()?;
        single_bytes_are_passed_on_at_once(&wire)?;
        ensure!(pipes()? == before, "{way} took a pipe for single bytes");

        let (client, server) = wire.pair()?;
        let taken = client.say_until_held_back(&mut Noise::new(14))?;
        ensure!((pipes()? > before) == pipes_of_bulk, "{way}: {before} pipes, then {}", pipes()?);
        drop(client);
        server.hear_noise(&mut Noise::new(14), taken)?;
        server.hear_end()?;
    }
    Ok(())
}

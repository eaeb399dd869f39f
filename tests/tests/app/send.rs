//! The many ways of handing bytes to a socket, and what is heard of them.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::Duration;

use ambassador_tests::noise::Noise;
use ambassador_tests::peer::{Peer, turn_on};
use ambassador_tests::wait::{SOON, until};
use ambassador_tests::way::{Way, Wire, exchange};
use ambassador_tests::{on_every_way, skip};
use anyhow::{Context, Result, ensure};
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::pipe::SpliceFlags;

on_every_way! { tcp: Tcp;
    zero_copy_sends_are_completed,
    urgent_byte_arrives,
    splice_from_a_socket_and_to_it,
    sendfile_to_a_socket,
    corked_pieces_arrive,
    records_of_many_threads_stay_whole,
    io_uring_sends_and_receives,
}

on_every_way! { auto: Auto;
    zero_copy_sends_are_completed,
    splice_from_a_socket_and_to_it,
    sendfile_to_a_socket,
    corked_pieces_arrive,
    records_of_many_threads_stay_whole,
    io_uring_sends_and_receives,
}

fn zero_copy_sends_are_completed(wire: &Wire) -> Result<()> {
    const SENDS: usize = 10;
    let (client, server) = wire.pair()?;
    until_latched(&client, &server)?;
    turn_on(client.socket(), libc::SOL_SOCKET, libc::SO_ZEROCOPY)?;
    let bytes = Noise::new(2).bytes(16 << 10);
    for _ in 0..SENDS {
        let sent = client.socket().send_with_flags(&bytes, libc::MSG_ZEROCOPY)?;
        ensure!(sent == bytes.len(), "{sent} of {} bytes were sent", bytes.len());
        ensure!(server.hear(bytes.len())? == bytes);
    }
    let completion = || {
        // What is told is in the control data; that it is told is enough here.
        match rustix::net::recv(client.socket(), &mut [0; 1], RecvFlags::ERRQUEUE) {
            Ok(_) => Ok(Some(())),
            Err(Errno::AGAIN) => Ok(None),
            Err(error) => Err(error).context("read the error queue"),
        }
    };
    if wire.road.way == Way::Sockmap {
        let told = until("a completion", Duration::from_millis(500), completion);
        ensure!(told.is_err(), "sockmap: this kernel completes zero-copy sends, say so");
        return Ok(());
    }
    until("the completion of a zero-copy send", SOON, completion)
}

/// Once the second answer has come back, `sockmap` carries what the client sends next.
fn until_latched(client: &Peer, server: &Peer) -> Result<()> {
    (0..2).try_for_each(|_| exchange(client, server))
}

/// A relay has one stream on each side, so that an urgent byte arrives in line.
fn urgent_byte_arrives(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    until_latched(&client, &server)?;
    client.socket().send_out_of_band(b"!").context("send an urgent byte")?;
    client.say(b"after")?;
    if matches!(wire.road.way, Way::Unproxied | Way::Direct | Way::Sockmap) {
        let mut urgent = [0];
        until("the urgent byte", SOON, || {
            match rustix::net::recv(server.socket(), &mut urgent, RecvFlags::OOB) {
                Ok((_, read)) => Ok(Some(read)),
                Err(Errno::AGAIN | Errno::INVAL) => Ok(None),
                Err(error) => Err(error).context("receive the urgent byte"),
            }
        })?;
        ensure!(urgent == *b"!" && server.hear(5)? == b"after");
    } else {
        ensure!(server.hear(6)? == b"!after");
    }
    Ok(())
}

fn splice_from_a_socket_and_to_it(wire: &Wire) -> Result<()> {
    const LENGTH: usize = 256 << 10;
    let (client, server) = wire.blocking_pair()?;
    let (out, into) = rustix::pipe::pipe().context("make a pipe")?;
    std::thread::scope(|scope| {
        let saying = scope.spawn(|| server.say_noise(&mut Noise::new(6), LENGTH));
        // From the client's socket into the pipe, and from the pipe back into the socket.
        let returning = scope.spawn(|| -> Result<()> {
            let mut left = LENGTH;
            while left > 0 {
                let most = left.min(32 << 10);
                let moved = rustix::pipe::splice(
                    client.socket(),
                    None,
                    &into,
                    None,
                    most,
                    SpliceFlags::MOVE,
                )
                .context("splice from a socket")?;
                ensure!(moved > 0, "the end came {left} bytes early");
                let mut piped = moved;
                while piped > 0 {
                    let flags = SpliceFlags::MOVE;
                    piped -= rustix::pipe::splice(&out, None, client.socket(), None, piped, flags)
                        .context("splice to a socket")?;
                }
                left -= moved;
            }
            client.finish()
        });
        server.hear_noise(&mut Noise::new(6), LENGTH)?;
        server.hear_end()?;
        saying.join().expect("the server does not panic")?;
        returning.join().expect("the client does not panic")
    })
}

fn sendfile_to_a_socket(wire: &Wire) -> Result<()> {
    const LENGTH: usize = 4 << 20;
    let (client, server) = wire.blocking_pair()?;
    let mut file: File = tempfile::tempfile().context("create a file")?;
    file.write_all(&Noise::new(7).bytes(LENGTH)).context("fill a file")?;
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| -> Result<()> {
            let mut offset = 0;
            while offset < LENGTH as u64 {
                let left = LENGTH - offset as usize;
                rustix::fs::sendfile(client.socket(), &file, Some(&mut offset), left)
                    .context("send a file")?;
            }
            client.finish()
        });
        server.hear_noise(&mut Noise::new(7), LENGTH)?;
        server.hear_end()?;
        sending.join().expect("the sender does not panic")
    })
}

fn corked_pieces_arrive(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    let mut said = Noise::new(8);
    let mut heard = said.clone();
    for length in [1, 100, 1_448, 20_000] {
        let piece = said.bytes(length);
        let sent = client.socket().send_with_flags(&piece, libc::MSG_MORE)?;
        ensure!(sent == length, "{sent} of {length} bytes were sent");
    }
    client.say_noise(&mut said, 1)?;
    server.hear_noise(&mut heard, 1 + 100 + 1_448 + 20_000 + 1)?;

    client.socket().set_tcp_cork(true).context("cork the socket")?;
    for length in [3, 500, 70_000] {
        client.say_noise(&mut said, length)?;
    }
    client.socket().set_tcp_cork(false).context("uncork the socket")?;
    server.hear_noise(&mut heard, 3 + 500 + 70_000)?;

    // A cork that is never drawn holds back nothing for long.
    client.socket().set_tcp_cork(true).context("cork the socket")?;
    client.say_noise(&mut said, 10)?;
    server.hear_noise(&mut heard, 10)
}

/// As writers of log lines do: each record is one small write(2), and no two are mixed up.
fn records_of_many_threads_stay_whole(wire: &Wire) -> Result<()> {
    const THREADS: u8 = 8;
    const RECORDS: u32 = 400;
    let record = |thread: u8, number: u32| {
        let mut noise = Noise::new(u64::from(thread) << 32 | u64::from(number));
        let length = 8 + noise.below(120) as u8;
        let mut record = vec![thread, length];
        record.extend(number.to_be_bytes());
        record.extend(noise.bytes(usize::from(length)));
        record
    };
    let (client, server) = wire.blocking_pair()?;
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let client = &client;
                scope.spawn(move || -> Result<()> {
                    for number in 0..RECORDS {
                        let record = record(thread, number);
                        let sent = client.socket().send(&record).context("send a record")?;
                        ensure!(sent == record.len(), "{sent} of {} bytes sent", record.len());
                    }
                    Ok(())
                })
            })
            .collect();
        let mut next = [0; THREADS as usize];
        for _ in 0..u32::from(THREADS) * RECORDS {
            let head = server.hear(6)?;
            let expected = next
                .get_mut(usize::from(head[0]))
                .with_context(|| format!("a record begins with {head:?}"))?;
            let whole = [head.clone(), server.hear(usize::from(head[1]))?].concat();
            ensure!(whole == record(head[0], *expected), "a record was torn, lost or repeated");
            *expected += 1;
        }
        for writer in writers {
            writer.join().expect("a writer does not panic")?;
        }
        client.finish()?;
        server.hear_end()
    })
}

fn io_uring_sends_and_receives(wire: &Wire) -> Result<()> {
    let mut ring = match IoUring::new(8) {
        Ok(ring) => ring,
        Err(error) => skip!("io_uring cannot be had here: {error}"),
    };
    let (client, server) = wire.blocking_pair()?;
    let descriptor = Fd(client.socket().as_raw_fd());
    for length in [1, 1_000, 60_000, 200_000] {
        // For ever: an operation that a failing test leaves behind must not find them gone.
        let out: &[u8] = Noise::new(9).bytes(length).leak();
        let into = vec![0; length].leak();
        let receive = opcode::Recv::new(descriptor, into.as_mut_ptr(), length as u32);
        let send = opcode::Send::new(descriptor, out.as_ptr(), length as u32);
        let all = libc::MSG_WAITALL;
        for operation in [receive.flags(all).build(), send.flags(all).build()] {
            // SAFETY: its buffer lives for ever, and is not touched before it has completed.
            unsafe { ring.submission().push(&operation) }.context("queue an operation")?;
        }
        ring.submit().context("submit operations")?;
        ensure!(server.hear(length)? == out);
        let answer = Noise::new(10).bytes(length);
        server.say(&answer)?;
        for _ in 0..2 {
            let limit = Timespec::from(SOON);
            let limit = SubmitArgs::new().timespec(&limit);
            ring.submitter().submit_with_args(1, &limit).context("wait for an operation")?;
            let done = ring.completion().next().context("an operation did not complete")?;
            ensure!(done.result() == length as i32, "{} of {length} bytes", done.result());
        }
        ensure!(into == answer);
    }
    Ok(())
}

//! How long a call may wait, what ends the wait, and what can be seen meanwhile.

use std::io::{self, ErrorKind, Read};
use std::os::unix::thread::JoinHandleExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use ambassador_tests::address::Family;
use ambassador_tests::noise::Noise;
use ambassador_tests::peer::Peer;
use ambassador_tests::readiness::Readiness;
use ambassador_tests::wait::{SOON, until_true};
use ambassador_tests::way::{Way, Wire};
use ambassador_tests::{needs, on_every_way};
use anyhow::{Context, Result, bail, ensure};
use rustix::event::epoll::EventFlags;
use rustix::net::RecvFlags;

const MIB: usize = 1 << 20;
/// So long a thread is left in a call that must not return yet.
const WHILE: Duration = Duration::from_millis(100);

on_every_way! { tcp: Tcp;
    blocking_read_lasts_while_another_thread_writes,
    blocking_read_lasts_after_finishing,
    blocking_read_lasts_across_a_signal,
    waiting_bytes_are_counted,
    peeking_takes_nothing_away,
    read_gives_up_at_its_timeout,
    read_of_all_waits_for_all,
    edge_triggered_writer_is_woken,
    level_triggered_writer_does_not_spin,
    socket_may_change_between_blocking_and_not,
}

on_every_way! { auto: Auto;
    blocking_read_lasts_while_another_thread_writes,
    blocking_read_lasts_after_finishing,
    blocking_read_lasts_across_a_signal,
    waiting_bytes_are_counted,
    peeking_takes_nothing_away,
    read_gives_up_at_its_timeout,
    read_of_all_waits_for_all,
    edge_triggered_writer_is_woken,
    level_triggered_writer_does_not_spin,
    socket_may_change_between_blocking_and_not,
}

/// One read(2) in a thread of its own, which waits there by now, with no timeout: a signal would end one
/// that has a timeout.
fn blocking_read(client: &Peer) -> Result<JoinHandle<io::Result<Vec<u8>>>> {
    let mut socket = client.socket().try_clone().context("clone the client's socket")?;
    socket.set_read_timeout(None).context("remove a socket's timeout")?;
    let (say, said) = channel();
    let reader = spawn(move || {
        // Whoever asked may have given up.
        let _ = say.send(std::fs::read_link("/proc/thread-self")?);
        let mut bytes = vec![0; 64];
        let read = socket.read(&mut bytes)?;
        bytes.truncate(read);
        Ok(bytes)
    });
    let thread = said.recv().context("start a reader")?;
    let stat = Path::new("/proc").join(thread).join("stat");
    until_true("the reader to wait", || {
        // Its name, in brackets, and its state.
        let asleep = std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") S "));
        Ok(asleep || reader.is_finished())
    })?;
    Ok(reader)
}

/// What a blocking read is owed that was woken by something else before its data came. Any wake-up ends
/// the wait of a socket that is in a sockmap: that cannot be helped, and `auto` keeps such clients out.
fn lasted(wire: &Wire, read: JoinHandle<io::Result<Vec<u8>>>, data: &[u8]) -> Result<()> {
    let read = read.join().expect("a reader does not panic");
    match wire.road.way {
        Way::Sockmap => ensure!(
            read.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock),
            "sockmap: this kernel has blocking reads repaired, say so in the design: {read:?}"
        ),
        _ => ensure!(read.context("a blocking read")? == data),
    }
    Ok(())
}

fn blocking_read_lasts_while_another_thread_writes(wire: &Wire) -> Result<()> {
    let (client, server) = wire.blocking_pair()?;
    let read = blocking_read(&client)?;
    let writing = spawn(move || client.say_noise(&mut Noise::new(1), 16 * MIB));
    server.hear_noise(&mut Noise::new(1), 16 * MIB)?;
    writing.join().expect("the writer does not panic")?;
    server.say(b"answer")?;
    if wire.road.way == Way::Sockmap {
        // Acknowledgements wake the reader, and only what took the native way has any.
        let read = read.join().expect("a reader does not panic");
        let woken = |error: &io::Error| error.kind() == ErrorKind::WouldBlock;
        ensure!(read.as_ref().map_or_else(woken, |heard| heard == b"answer"), "{read:?}");
        return Ok(());
    }
    lasted(wire, read, b"answer")
}

fn blocking_read_lasts_after_finishing(wire: &Wire) -> Result<()> {
    let (client, server) = wire.blocking_pair()?;
    client.say(b"question")?;
    let read = blocking_read(&client)?;
    client.finish()?;
    ensure!(server.hear_to_end()? == b"question");
    // The acknowledgement of the end must find the reader waiting.
    sleep(WHILE);
    server.say(b"answer")?;
    lasted(wire, read, b"answer")
}

/// That a client has turned blocking is seen when it says something, and only then is it given back.
#[test]
fn blocking_read_of_a_client_that_has_turned_and_said_nothing_since_may_end_early() -> Result<()> {
    needs!(Sockmap);
    let wire = Wire::new(Way::Turned, Family::Tcp)?;
    let (client, server) = wire.pair()?;
    client.socket().set_nonblocking(false).context("make a client blocking")?;
    let read = blocking_read(&client)?;
    client.finish()?;
    server.hear_end()?;
    sleep(WHILE);
    server.say(b"answer")?;
    let read = read.join().expect("a reader does not panic");
    ensure!(
        read.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock),
        "this kernel has blocking reads repaired, say so in the design: {read:?}"
    );
    ensure!(client.hear(6)? == b"answer");
    Ok(())
}

fn blocking_read_lasts_across_a_signal(wire: &Wire) -> Result<()> {
    static CAUGHT: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn catch(_: libc::c_int) {
        CAUGHT.fetch_add(1, Ordering::SeqCst);
    }
    // SAFETY: an all-zero sigaction is a valid one, with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = catch as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler does nothing but add to an atomic number.
    let installed = unsafe { libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()) };
    ensure!(installed == 0, "install a signal handler: {}", io::Error::last_os_error());

    let (client, server) = wire.blocking_pair()?;
    let read = blocking_read(&client)?;
    for _ in 0..10 {
        sleep(WHILE / 10);
        let before = CAUGHT.load(Ordering::SeqCst);
        // SAFETY: the thread has not been joined, so that its handle is valid even if it has ended.
        unsafe { libc::pthread_kill(read.as_pthread_t(), libc::SIGUSR1) };
        until_true("the signal to be caught", || {
            Ok(CAUGHT.load(Ordering::SeqCst) > before || read.is_finished())
        })?;
    }
    server.say(b"answer")?;
    lasted(wire, read, b"answer")
}

/// FIONREAD is what many event loops size their buffers by.
fn waiting_bytes_are_counted(wire: &Wire) -> Result<()> {
    let (client, server) = wire.blocking_pair()?;
    server.say(b"hello")?;
    let readiness = Readiness::of(client.socket(), EventFlags::IN)?;
    readiness.within(SOON)?.context("the client is not told that it can read")?;
    let waiting = rustix::io::ioctl_fionread(client.socket()).context("count waiting bytes")?;
    // Linux 6.12 and later count only what came through the map.
    let expected = if wire.road.way == Way::Sockmap { 0 } else { 5 };
    ensure!(waiting == expected, "{waiting} bytes are said to wait, {expected} were expected");
    ensure!(client.hear(5)? == b"hello");
    Ok(())
}

fn peeking_takes_nothing_away(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    server.say(b"hello")?;
    let readiness = Readiness::of(client.socket(), EventFlags::IN)?;
    for _ in 0..3 {
        readiness.within(SOON)?.context("the client is not told that it can read")?;
        let mut bytes = [0; 64];
        let (_, read) = rustix::net::recv(client.socket(), &mut bytes, RecvFlags::PEEK)
            .context("peek at what waits")?;
        ensure!(bytes[..read] == *b"hello");
    }
    client.finish()?;
    server.finish()?;
    ensure!(client.hear_to_end()? == b"hello");
    Ok(())
}

fn read_gives_up_at_its_timeout(wire: &Wire) -> Result<()> {
    let (client, server) = wire.blocking_pair()?;
    client.socket().set_read_timeout(Some(WHILE)).context("set SO_RCVTIMEO")?;
    let before = Instant::now();
    loop {
        match client.socket().read(&mut [0; 64]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            // No signal is sent to this thread. But that a child of this process has ended can be told to any, while the
            // first one starts another and blocks signals (kernel/signal.c: `sig_ignored`, `complete_signal`), and a read
            // with a timeout is not resumed.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            read => bail!("{read:?} where nothing was to be read"),
        }
    }
    let waited = before.elapsed();
    ensure!(waited >= WHILE * 9 / 10 && waited < SOON, "it waited for {waited:?}");
    server.say(b"late")?;
    client.socket().set_read_timeout(Some(SOON)).context("set SO_RCVTIMEO")?;
    ensure!(client.hear(4)? == b"late");
    Ok(())
}

fn read_of_all_waits_for_all(wire: &Wire) -> Result<()> {
    const LENGTH: usize = MIB;
    let (client, server) = wire.blocking_pair()?;
    std::thread::scope(|scope| {
        let saying = scope.spawn(|| -> Result<()> {
            let mut noise = Noise::new(5);
            for _ in 0..4 {
                server.say_noise(&mut noise, LENGTH / 4)?;
                sleep(WHILE / 4);
            }
            Ok(())
        });
        let mut bytes = vec![0; LENGTH];
        let (_, read) = rustix::net::recv(client.socket(), &mut bytes[..], RecvFlags::WAITALL)
            .context("receive all")?;
        ensure!(read == LENGTH, "{read} of {LENGTH} bytes were received");
        ensure!(bytes == Noise::new(5).bytes(LENGTH));
        saying.join().expect("the server does not panic")
    })
}

/// Writes until the socket takes no more.
fn fill(client: &Peer, noise: &mut Noise) -> Result<usize> {
    let mut taken = 0;
    loop {
        let mut ahead = noise.clone();
        let bytes = ahead.bytes(16 << 10);
        match client.socket().send(&bytes) {
            Ok(sent) => {
                noise.fill(&mut vec![0; sent]);
                taken += sent;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(taken),
            Err(error) => return Err(error).context("write until there is no room"),
        }
    }
}

fn edge_triggered_writer_is_woken(wire: &Wire) -> Result<()> {
    const LENGTH: usize = 64 * MIB;
    let (client, server) = wire.pair()?;
    client.socket().set_nonblocking(true).context("make the client non-blocking")?;
    let readiness = Readiness::of(client.socket(), EventFlags::OUT | EventFlags::ET)?;
    let mut noise = Noise::new(3);
    let mut written = 0;
    // Until the server has stalled everything on the way.
    while readiness.within(WHILE * 5)?.is_some() {
        written += fill(&client, &mut noise)?;
    }
    ensure!(written < LENGTH, "{written} bytes were taken though nobody read");
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| server.hear_noise(&mut Noise::new(3), LENGTH));
        while written < LENGTH {
            readiness.within(SOON)?.with_context(|| format!("no event after {written} bytes"))?;
            written += fill(&client, &mut noise)?;
            if reading.is_finished() {
                break;
            }
        }
        reading.join().expect("the reader does not panic")
    })
}

fn level_triggered_writer_does_not_spin(wire: &Wire) -> Result<()> {
    let (client, server) = wire.pair()?;
    client.socket().set_nonblocking(true).context("make the client non-blocking")?;
    let readiness = Readiness::of(client.socket(), EventFlags::OUT)?;
    let mut noise = Noise::new(4);
    let (mut written, mut in_vain) = (0, 0);
    while readiness.within(WHILE * 5)?.is_some() {
        match fill(&client, &mut noise)? {
            0 => in_vain += 1,
            taken => written += taken,
        }
        ensure!(in_vain < 10, "told {in_vain} times that there is room, when there was none");
    }
    server.hear_noise(&mut Noise::new(4), written)?;
    readiness.within(SOON)?.map(drop).context("no event when there was room again")
}

fn socket_may_change_between_blocking_and_not(wire: &Wire) -> Result<()> {
    const TURNS: usize = 20;
    const LENGTH: usize = 200_000;
    let (client, server) = wire.blocking_pair()?;
    std::thread::scope(|scope| {
        let echoing = scope.spawn(|| -> Result<()> {
            for turn in 0..TURNS {
                server.hear_noise(&mut Noise::new(turn as u64), LENGTH)?;
                server.say_noise(&mut Noise::new(!turn as u64), LENGTH)?;
            }
            server.hear_end()
        });
        for turn in 0..TURNS {
            let nonblocking = turn % 2 == 1;
            client.socket().set_nonblocking(nonblocking).context("change a socket's mode")?;
            client.say_noise(&mut Noise::new(turn as u64), LENGTH)?;
            // In the middle of a conversation, too.
            client.socket().set_nonblocking(!nonblocking).context("change a socket's mode")?;
            client.hear_noise(&mut Noise::new(!turn as u64), LENGTH)?;
        }
        client.finish()?;
        echoing.join().expect("the server does not panic")
    })
}

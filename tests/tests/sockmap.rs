//! The `sockmap` tier from inside: which clients are taken, what passes user space by, what is held back,
//! and how a connection is given back. What it owes a connection is told by `relay.rs`, on every way.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::thread::scope;
use std::time::Duration;

use ambassador::datapath::obstacle;
use ambassador::datapath::sockmap::{Attached, Limits, Sockmap, load};
use ambassador::proxy::relay::{Broken, Traffic, relay};
use ambassador::proxy::shortcut::{Shortcut, Shortcuts};
use ambassador::proxy::socket::{Family, Socket};
use ambassador_tests::address::Address;
use ambassador_tests::cgroup;
use ambassador_tests::noise::Noise;
use ambassador_tests::peer::Peer;
use ambassador_tests::skip;
use ambassador_tests::wait::{SOON, until, until_true};
use anyhow::{Context, Result, ensure};
use socket2::{Domain, SockAddr, Type};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

const MIB: usize = 1 << 20;
const LIMITS: Limits = Limits { bytes: MIB as u64, messages: 2048 };

/// Ends the calling test where its means are not there.
macro_rules! tier {
    ($clients:expr) => {{
        if let Err(obstacle) = obstacle::to_load() {
            skip!("{obstacle}");
        }
        Tier::new($clients)?
    }};
}

#[test]
fn most_bytes_of_a_latched_client_pass_user_space_by() -> Result<()> {
    let tier = tier!(Clients::Fit);
    let connection = tier.connect(Blocking::No)?;
    let shortcut = connection.shortcut()?;
    const LENGTH: usize = 8 * MIB;
    scope(|scope| {
        let sending = scope.spawn(|| connection.client.say_noise(&mut Noise::new(1), LENGTH));
        connection.server.hear_noise(&mut Noise::new(1), LENGTH)?;
        sending.join().expect("the sender does not panic")
    })?;
    let carried = shortcut.carried();
    ensure!(carried > LENGTH as u64 / 4, "only {carried} of {LENGTH} bytes took the shortcut");
    connection.ends_well(LENGTH as u64)
}

/// Sizes around every boundary, and sends that are taken in part.
#[test]
fn sends_taken_in_part_are_counted_exactly() -> Result<()> {
    let tier = tier!(Clients::Fit);
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

#[test]
fn stalled_upstream_is_sent_no_more_than_the_budget() -> Result<()> {
    let tier = tier!(Clients::Fit);
    let connection = tier.connect(Blocking::No)?;
    let shortcut = connection.shortcut()?;
    let mut noise = Noise::new(5);
    let taken = connection.client.say_until_held_back(&mut noise)?;
    // What the server's socket has acknowledged without a reader is in flight no more.
    let acknowledged = waiting(&connection.server)?;
    let carried = shortcut.carried();
    ensure!(carried > 0 && carried <= LIMITS.bytes + acknowledged, "{carried} bytes were carried");
    ensure!(taken as u64 > carried, "what was held back did not take the native way");
    scope(|scope| {
        let sending = scope.spawn(|| connection.client.say_noise(&mut noise, 4 * MIB));
        connection.server.hear_noise(&mut Noise::new(5), taken + 4 * MIB)?;
        sending.join().expect("the sender does not panic")
    })?;
    // Once everything is acknowledged, it latches again.
    let before = shortcut.carried();
    until_true("the connection to latch again", || {
        connection.say_up(b"more?")?;
        Ok(shortcut.carried() > before)
    })?;
    Ok(())
}

#[test]
fn messages_in_flight_are_bounded_too() -> Result<()> {
    let tier = tier!(Clients::Fit);
    // With a small window, acknowledgements stop long before the budget of bytes is used up.
    let connection = tier.connect_with(&tier.listener, Blocking::No, Some(1))?;
    let shortcut = connection.shortcut()?;
    let sent = 8 * LIMITS.messages;
    for _ in 0..sent {
        connection.client.say(b".")?;
    }
    let (acknowledged, carried) = (waiting(&connection.server)?, shortcut.carried());
    ensure!(
        carried > 0 && carried <= acknowledged + LIMITS.messages * 9 / 8,
        "{carried} messages were carried, {acknowledged} of them acknowledged"
    );
    ensure!(connection.server.hear(sent as usize)?.iter().all(|byte| *byte == b'.'));
    connection.ends_well(sent)
}

#[test]
fn blocking_client_is_left_alone() -> Result<()> {
    let tier = tier!(Clients::Fit);
    let connection = tier.connect(Blocking::Yes)?;
    ensure!(connection.traffic.shortcut.get().is_none(), "a blocking client was enrolled");
    connection.say_up(b"hello")?;
    until_true("the bytes to be counted", || Ok(connection.traffic.up() == 5))
}

#[test]
fn blocking_client_is_taken_where_the_route_asks_for_it() -> Result<()> {
    let tier = tier!(Clients::Any);
    let connection = tier.connect(Blocking::Yes)?;
    connection.until_latched()
}

#[test]
fn client_of_another_listener_is_left_alone() -> Result<()> {
    let tier = tier!(Clients::Any);
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("bind a listener")?;
    let connection = tier.connect_to(&other, Blocking::No)?;
    ensure!(connection.traffic.shortcut.get().is_none(), "a stranger's client was enrolled");
    Ok(())
}

#[test]
fn client_that_turns_blocking_gets_an_ordinary_socket_back() -> Result<()> {
    let tier = tier!(Clients::Fit);
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
    let tier = tier!(Clients::Fit);
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
fn latched_traffic_does_not_wake_the_relay() -> Result<()> {
    let tier = tier!(Clients::Fit);
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
    let tier = tier!(Clients::Fit);
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

/// Which clients a listener takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Clients {
    /// Those that would not notice.
    Fit,
    Any,
}

/// What a client's socket is like when it connects.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Blocking {
    Yes,
    No,
}

/// The tier, attached to the cgroup of this process, with one listener and one thread of relays.
struct Tier {
    runtime: Runtime,
    thread: i32,
    sockmap: Sockmap,
    listener: TcpListener,
    _attached: Attached,
}

/// One connection through a relay.
struct Connection<'a> {
    client: Peer,
    server: Peer,
    traffic: Arc<Traffic>,
    relay: Mutex<Option<JoinHandle<Result<(), Broken>>>>,
    tier: &'a Tier,
}

impl Tier {
    fn new(clients: Clients) -> Result<Self> {
        let cgroup = std::fs::File::open(cgroup::of_this_process()?).context("open the cgroup")?;
        let (sockmap, _attached) = load(cgroup, LIMITS)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("bind a listener")?;
        sockmap.listen(listener.as_fd(), clients == Clients::Any)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("start a runtime")?;
        let of_relays = runtime.spawn(async { thread_id() });
        let thread = runtime.block_on(of_relays).context("ask for the relays' thread")?;
        Ok(Self { runtime, thread, sockmap, listener, _attached })
    }

    fn connect(&self, blocking: Blocking) -> Result<Connection<'_>> {
        self.connect_to(&self.listener, blocking)
    }

    fn connect_to(&self, listener: &TcpListener, blocking: Blocking) -> Result<Connection<'_>> {
        self.connect_with(listener, blocking, None)
    }

    /// To a server whose receive buffer has this size.
    fn connect_with(
        &self,
        listener: &TcpListener,
        blocking: Blocking,
        receive_buffer: Option<usize>,
    ) -> Result<Connection<'_>> {
        let client = socket2::Socket::new(Domain::IPV4, Type::STREAM, None)?;
        client.set_nonblocking(blocking == Blocking::No)?;
        match client.connect(&SockAddr::from(listener.local_addr()?)) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            other => other.context("connect a client")?,
        }
        let (accepted, _) = listener.accept().context("accept a client")?;
        accepted.set_nonblocking(true)?;

        let upstream = Address::from(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).listen()?;
        if let Some(size) = receive_buffer {
            upstream.socket().set_recv_buffer_size(size).context("set a receive buffer")?;
        }
        let ours = socket2::Socket::new(Domain::IPV4, Type::STREAM, None)?;
        self.sockmap.prepare(ours.as_fd());
        ours.connect(&SockAddr::from(upstream.address().tcp()?)).context("connect upstream")?;
        let server = upstream.accept()?;
        ours.set_nonblocking(true)?;
        ours.set_tcp_nodelay(true)?;

        let traffic = Arc::new(Traffic::default());
        if let Some(shortcut) = self.sockmap.open(accepted.as_fd(), ours.as_fd()) {
            traffic.shortcut.set(shortcut).expect("the shortcut is set once");
        }
        let (entered, relayed) = (self.runtime.enter(), Arc::clone(&traffic));
        let client_side = Socket::new(accepted.into(), Family::Tcp)?;
        let upstream_side = Socket::new(ours, Family::Tcp)?;
        drop(entered);
        let relay = self
            .runtime
            .spawn(async move { relay(&client_side, &upstream_side, None, &relayed, None).await });
        let (client, relay) = (Peer::of(client)?, Mutex::new(Some(relay)));
        Ok(Connection { client, server, traffic, relay, tier: self })
    }

    /// How often the relays' thread has gone to sleep, and so been woken.
    fn wake_ups(&self) -> Result<u64> {
        let path = format!("/proc/self/task/{}/status", self.thread);
        let status = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.context("find the voluntary switches of a thread")?
            .trim()
            .parse()
            .context("parse them")
    }
}

impl Connection<'_> {
    fn shortcut(&self) -> Result<&Arc<dyn Shortcut>> {
        self.traffic.shortcut.get().context("the client was not enrolled")
    }

    /// The client says something, and the server hears it.
    fn say_up(&self, bytes: &[u8]) -> Result<()> {
        self.client.say(bytes)?;
        let heard = self.server.hear(bytes.len())?;
        ensure!(heard == bytes, "said {bytes:?}, heard {heard:?}");
        Ok(())
    }

    fn until_latched(&self) -> Result<()> {
        let shortcut = self.shortcut()?;
        until_true("the connection to latch", || {
            self.say_up(b"latched?")?;
            Ok(shortcut.carried() > 0)
        })
    }

    /// Both ends finish, the relay is content, and all that the client sent is counted.
    fn ends_well(self, sent: u64) -> Result<()> {
        self.client.finish()?;
        self.server.hear_end()?;
        self.server.finish()?;
        self.client.hear_end()?;
        let relay = self.relay.lock().expect("nobody panics").take().context("end twice")?;
        let ended = self.tier.runtime.block_on(relay).context("join the relay")?;
        ensure!(ended.is_ok(), "the relay ended with {ended:?}");
        ensure!(self.traffic.up() == sent, "{} of {sent} bytes counted", self.traffic.up());
        Ok(())
    }
}

/// Bytes that wait to be read.
fn waiting(peer: &Peer) -> Result<u64> {
    rustix::io::ioctl_fionread(peer.socket()).context("count waiting bytes")
}

fn thread_id() -> i32 {
    // SAFETY: gettid takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

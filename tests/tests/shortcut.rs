//! What the relay owes a connection beside whose bytes others take a shortcut: its own bytes and the end
//! come after them. Here a shortcut says what the test wants; real ones are in `sockmap.rs`.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ambassador::proxy::relay::{Traffic, relay};
use ambassador::proxy::shortcut::{Candidate, Prospect, Shortcut};
use ambassador::proxy::socket::{Family, Socket};
use ambassador_tests::peer::Peer;
use ambassador_tests::wait::until_true;
use anyhow::{Context, Result, ensure};

/// A shortcut that carries what the test says, and is settled when the test says so.
#[derive(Debug, Default)]
struct Puppet {
    carried: AtomicU64,
    settled: AtomicBool,
    /// How often it says that it is settled before that.
    hasty: AtomicU64,
    asked: AtomicU64,
    forwarded: AtomicU64,
}

impl Shortcut for Puppet {
    fn carried(&self) -> u64 {
        self.carried.load(Ordering::SeqCst)
    }

    fn in_flight(&self) -> u64 {
        0
    }

    fn is_settled(&self, _upstream: BorrowedFd<'_>) -> bool {
        let asked = self.asked.fetch_add(1, Ordering::SeqCst);
        asked < self.hasty.load(Ordering::SeqCst) || self.settled.load(Ordering::SeqCst)
    }

    fn forwarded(&self, bytes: u64) {
        self.forwarded.store(bytes, Ordering::SeqCst);
    }

    fn close(&self) {}
}

impl Puppet {
    /// Lets the relay see, more than once, that it has to wait.
    fn keep_waiting(&self) -> Result<()> {
        let before = self.asked.load(Ordering::SeqCst);
        until_true("the relay to ask again", || Ok(self.asked.load(Ordering::SeqCst) >= before + 5))
    }
}

/// Has the server reset the connection while a shortcut is opened, which is told of it in the place of the relay.
#[derive(Debug)]
struct ResetMeanwhile(Mutex<Option<Peer>>);

impl Candidate for ResetMeanwhile {
    fn prepare(&self, _upstream: BorrowedFd<'_>) {}

    fn can_have(&self) -> bool {
        true
    }

    fn open(
        &self,
        _client: BorrowedFd<'_>,
        upstream: BorrowedFd<'_>,
        _forwarded: u64,
    ) -> Option<Arc<dyn Shortcut>> {
        let server = self.0.lock().expect("nobody panics").take().expect("opened once");
        server.reset().expect("reset");
        let told = || Ok(socket2::SockRef::from(&upstream).take_error()?.is_some());
        until_true("the reset to arrive", told).expect("a reset");
        None
    }

    fn decline(&self) {}
}

/// A client and a server with a relay between them, in a runtime that lives as long as they do.
struct Pair {
    client: Peer,
    server: Peer,
    puppet: Arc<Puppet>,
    traffic: Arc<Traffic>,
    _runtime: tokio::runtime::Runtime,
}

impl Pair {
    fn new() -> Result<Self> {
        let runtime = runtime()?;
        let puppet = Arc::new(Puppet::default());
        let traffic = Arc::new(Traffic::default());
        traffic.shortcut.set(Arc::clone(&puppet) as _).expect("the shortcut is set once");
        let (client, accepted) = connected()?;
        let (upstream, server) = connected()?;
        let relayed = Arc::clone(&traffic);
        runtime.spawn(async move {
            let client = Socket::new(accepted.into(), Family::Tcp)?;
            let upstream = Socket::new(upstream.into(), Family::Tcp)?;
            relay(&client, &upstream, None, None, &relayed, None)
                .await
                .map_err(|it| anyhow::anyhow!("{it:?}"))
        });
        let (client, server) = (Peer::of(client.into())?, Peer::of(server.into())?);
        client.socket().set_nonblocking(false).context("make a client blocking")?;
        server.socket().set_nonblocking(false).context("make a server blocking")?;
        Ok(Self { client, server, puppet, traffic, _runtime: runtime })
    }
}

#[test]
fn relayed_bytes_wait_for_those_that_took_the_shortcut() -> Result<()> {
    let pair = Pair::new()?;
    pair.client.say(b"later")?;
    pair.puppet.keep_waiting()?;
    ensure!(waiting(&pair.server)? == 0, "bytes overtook those that took the shortcut");
    pair.puppet.settled.store(true, Ordering::SeqCst);
    ensure!(pair.server.hear(5)? == b"later");
    until_true("the bytes to be told", || Ok(pair.puppet.forwarded.load(Ordering::SeqCst) == 5))
}

#[test]
fn the_end_waits_for_bytes_that_took_the_shortcut() -> Result<()> {
    let pair = Pair::new()?;
    // Between the question and the end, the client may have sent more.
    pair.puppet.hasty.store(1, Ordering::SeqCst);
    pair.client.finish()?;
    pair.puppet.keep_waiting()?;
    pair.server.socket().set_nonblocking(true).context("make the server non-blocking")?;
    let early = pair.server.socket().peek(&mut [std::mem::MaybeUninit::uninit(); 1]);
    ensure!(early.is_err(), "the end overtook bytes that took the shortcut");
    pair.puppet.settled.store(true, Ordering::SeqCst);
    pair.server.hear_end()
}

#[test]
fn the_other_direction_waits_for_nothing() -> Result<()> {
    let pair = Pair::new()?;
    pair.client.say(b"held back")?;
    pair.puppet.keep_waiting()?;
    pair.server.say(b"meanwhile")?;
    ensure!(pair.client.hear(9)? == b"meanwhile");
    Ok(())
}

#[test]
fn bytes_that_took_the_shortcut_count_as_traffic() -> Result<()> {
    let pair = Pair::new()?;
    pair.puppet.settled.store(true, Ordering::SeqCst);
    pair.puppet.carried.store(1000, Ordering::SeqCst);
    pair.client.say(b"relayed")?;
    ensure!(pair.server.hear(7)? == b"relayed");
    until_true("the bytes to be counted", || Ok(pair.traffic.up() == 1007))?;
    ensure!(pair.traffic.total() == 1007);
    Ok(())
}

#[test]
fn reset_that_somebody_else_was_told_of_is_no_end() -> Result<()> {
    let runtime = runtime()?;
    let (client, accepted) = connected()?;
    let (upstream, server) = connected()?;
    let (client, server) = (Peer::of(client.into())?, Peer::of(server.into())?);
    client.socket().set_nonblocking(false).context("make a client blocking")?;
    let candidate = Arc::new(ResetMeanwhile(Mutex::new(Some(server))));
    let opening = Arc::clone(&candidate);
    let relayed = runtime.spawn(async move {
        let client = Socket::new(accepted.into(), Family::Tcp)?;
        let upstream = Socket::new(upstream.into(), Family::Tcp)?;
        let prospect = Prospect { candidate: &*opening, allowed: &|| true };
        let traffic = Traffic::default();
        let ended = relay(&client, &upstream, None, Some(prospect), &traffic, None).await;
        ended.map_err(|it| anyhow::anyhow!("{it:?}"))
    });
    client.say(b"one")?;
    until_true("the first piece", || {
        let server = candidate.0.lock().expect("nobody panics");
        Ok(waiting(server.as_ref().context("find the server")?)? == 3)
    })?;
    // With the second piece a shortcut is opened.
    client.say(b"two")?;
    client.finish()?;
    let ended = runtime.block_on(relayed).context("join the relay")?;
    ensure!(ended.is_err(), "a reset was taken for an end");
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("start a runtime")
}

/// Both ends of a connection, non-blocking.
fn connected() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    let here = TcpStream::connect(listener.local_addr()?).context("connect")?;
    let (there, _) = listener.accept().context("accept")?;
    here.set_nonblocking(true)?;
    there.set_nonblocking(true)?;
    Ok((here, there))
}

/// Bytes that wait to be read.
fn waiting(peer: &Peer) -> Result<u64> {
    rustix::io::ioctl_fionread(peer.socket()).context("count waiting bytes")
}

//! The tier in the hands of a test: loaded for this process, with a listener and relays of its own.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use ambassador::config::InFlight;
use ambassador::datapath::programs::{Links, Programs};
use ambassador::datapath::sockmap::{Enrol, Sockmap};
use ambassador::datapath::tables::Tables;
use ambassador::proxy::relay::{Broken, Traffic, relay};
use ambassador::proxy::shortcut::{Shortcut, Shortcuts};
use ambassador::proxy::socket::{Family, Socket};
use ambassador_tests::address::Address;
use ambassador_tests::cgroup;
use ambassador_tests::peer::Peer;
use ambassador_tests::wait::{SOON, until_true};
use anyhow::{Context, Result, ensure};
use socket2::{Domain, SockAddr, Type};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

/// What a client's socket is like when it connects.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocking {
    Yes,
    No,
}

/// The tier, attached to the cgroup of this process, with one listener and one thread of relays.
pub(crate) struct Tier {
    runtime: Runtime,
    thread: i32,
    sockmap: Sockmap,
    pub(crate) listener: TcpListener,
    _links: Links,
}

/// One connection through a relay.
pub(crate) struct Connection<'a> {
    pub(crate) client: Peer,
    pub(crate) server: Peer,
    pub(crate) traffic: Arc<Traffic>,
    /// The ambassador's socket to the server, in the hands of the test too.
    pub(crate) upstream: socket2::Socket,
    relay: Mutex<Option<JoinHandle<Result<(), Broken>>>>,
    tier: &'a Tier,
}

impl Tier {
    pub(crate) fn new(clients: Enrol, limits: InFlight) -> Result<Self> {
        let cgroup = std::fs::File::open(cgroup::of_this_process()?).context("open the cgroup")?;
        let mut programs = Programs::load(1)?;
        let _links = programs.attach(cgroup);
        let mut maps = programs.maps();
        Tables::new(&mut maps.duplicate()?)?.0.renew(None)?;
        let sockmap = Sockmap::new(&mut maps, limits)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("bind a listener")?;
        sockmap.enrol(listener.local_addr()?, clients)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("start a runtime")?;
        let of_relays = runtime.spawn(async { thread_id() });
        let thread = runtime.block_on(of_relays).context("ask for the relays' thread")?;
        Ok(Self { runtime, thread, sockmap, listener, _links })
    }

    pub(crate) fn connect(&self, blocking: Blocking) -> Result<Connection<'_>> {
        self.connect_to(&self.listener, blocking)
    }

    pub(crate) fn connect_to(
        &self,
        listener: &TcpListener,
        blocking: Blocking,
    ) -> Result<Connection<'_>> {
        self.connect_with(listener, blocking, None, |_| Ok(()))
    }

    /// To a server whose receive buffer has this size, on a socket of the ambassador that was seen before.
    pub(crate) fn connect_with(
        &self,
        listener: &TcpListener,
        blocking: Blocking,
        receive_buffer: Option<usize>,
        see: impl FnOnce(&socket2::Socket) -> Result<()>,
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
        let candidate = self.sockmap.candidate(accepted.as_fd());
        candidate.iter().for_each(|it| it.prepare(ours.as_fd()));
        ours.connect(&SockAddr::from(upstream.address().tcp()?)).context("connect upstream")?;
        let server = upstream.accept()?;
        ours.set_nonblocking(true)?;
        ours.set_tcp_nodelay(true)?;
        see(&ours)?;
        let shared = ours.try_clone().context("share a socket")?;

        let traffic = Arc::new(Traffic::default());
        if let Some(shortcut) = candidate.and_then(|it| it.open(accepted.as_fd(), ours.as_fd(), 0))
        {
            traffic.shortcut.set(shortcut).expect("the shortcut is set once");
        }
        let (entered, relayed) = (self.runtime.enter(), Arc::clone(&traffic));
        let client_side = Socket::new(accepted.into(), Family::Tcp)?;
        let upstream_side = Socket::new(ours, Family::Tcp)?;
        drop(entered);
        let relay = self.runtime.spawn(async move {
            let ended = relay(&client_side, &upstream_side, None, None, &relayed, None).await;
            if ended.is_err() {
                client_side.reset();
                upstream_side.reset();
            }
            ended
        });
        let (client, relay) = (Peer::of(client)?, Mutex::new(Some(relay)));
        Ok(Connection { client, server, traffic, upstream: shared, relay, tier: self })
    }

    /// Whether a client that was accepted is enrolled; it is no more.
    pub(crate) fn ends_enrolment(&self, accepted: &std::net::TcpStream) -> bool {
        self.sockmap.candidate(accepted.as_fd()).is_some()
    }

    /// Keeps the relays' thread busy until what is returned is dropped.
    pub(crate) fn stop_relays(&self) -> Result<Sender<()>> {
        let (stopped, stop) = channel::<()>();
        let (say, said) = channel();
        self.runtime.spawn(async move {
            let _ = say.send(());
            // Nobody sends anything: it ends when the sender is dropped.
            let _ = stop.recv();
        });
        said.recv_timeout(SOON).context("stop the relays")?;
        Ok(stopped)
    }

    /// How often the relays' thread has gone to sleep, and so been woken.
    pub(crate) fn wake_ups(&self) -> Result<u64> {
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
    pub(crate) fn shortcut(&self) -> Result<&Arc<dyn Shortcut>> {
        self.traffic.shortcut.get().context("the client was not enrolled")
    }

    /// The client says something, and the server hears it.
    pub(crate) fn say_up(&self, bytes: &[u8]) -> Result<()> {
        self.client.say(bytes)?;
        let heard = self.server.hear(bytes.len())?;
        ensure!(heard == bytes, "said {bytes:?}, heard {heard:?}");
        Ok(())
    }

    pub(crate) fn until_latched(&self) -> Result<()> {
        let shortcut = self.shortcut()?;
        until_true("the connection to latch", || {
            let before = shortcut.carried();
            self.say_up(b"latched?")?;
            Ok(shortcut.carried() > before)
        })
    }

    /// Both ends finish, the relay is content, and all that the client sent is counted.
    pub(crate) fn ends_well(self, sent: u64) -> Result<()> {
        drop(self.upstream);
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

fn thread_id() -> i32 {
    // SAFETY: gettid takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

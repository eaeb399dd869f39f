//! The connection tracker: loaded, attached to a cgroup, and its counts compared with what real
//! connections did.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};

use ambassador::datapath::probe;
use ambassador::datapath::tracker::{ConnectionCounts, Tracker};
use ambassador_tests::cgroup::Cgroup;
use ambassador_tests::skip;
use ambassador_tests::wait::until_true;
use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};

const NONE: ConnectionCounts = ConnectionCounts { opened: 0, accepted: 0, failed: 0, closed: 0 };

/// Ends the calling test where its means are not there.
macro_rules! require_tracker {
    () => {
        if let Err(obstacle) = probe::load() {
            skip!("{obstacle}");
        }
        if Command::new("python3").arg("--version").output().is_err() {
            skip!("python3, which opens the connections, is not installed");
        }
    };
}

#[test]
fn an_opened_connection_is_counted_and_so_is_its_end() -> Result<()> {
    require_tracker!();
    let cgroup = Cgroup::new()?;
    let mut tracker = Tracker::load()?;
    let _attached = tracker.attach(cgroup.open()?)?;

    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = Peer::start(CONNECT, Some(listener.local_addr()?), Some(&cgroup))?;
    let (server, _) = listener.accept()?;
    expect(&tracker, ConnectionCounts { opened: 1, ..NONE })?;

    client.finish()?;
    drop(server);
    expect(&tracker, ConnectionCounts { opened: 1, closed: 1, ..NONE })
}

#[test]
fn an_accepted_connection_is_counted_and_so_is_its_end() -> Result<()> {
    require_tracker!();
    let cgroup = Cgroup::new()?;
    let mut tracker = Tracker::load()?;
    let _attached = tracker.attach(cgroup.open()?)?;

    let server = Peer::start(ACCEPT, None, Some(&cgroup))?;
    let client = Peer::start(CONNECT, Some(server.said.parse()?), None)?;
    expect(&tracker, ConnectionCounts { accepted: 1, ..NONE })?;

    server.finish()?;
    client.finish()?;
    expect(&tracker, ConnectionCounts { accepted: 1, closed: 1, ..NONE })
}

#[test]
fn a_refused_connection_is_counted_as_failed() -> Result<()> {
    require_tracker!();
    let cgroup = Cgroup::new()?;
    let mut tracker = Tracker::load()?;
    let _attached = tracker.attach(cgroup.open()?)?;

    // Bound, so that nobody else gets the port, but not listening.
    let bound = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    bound.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    let address = bound.local_addr()?.as_socket().context("a bound socket has an address")?;
    Peer::start(BE_REFUSED, Some(address), Some(&cgroup))?.finish()?;
    expect(&tracker, ConnectionCounts { failed: 1, ..NONE })
}

#[test]
fn no_event_is_lost_among_many_connections() -> Result<()> {
    require_tracker!();
    let cgroup = Cgroup::new()?;
    let mut tracker = Tracker::load()?;
    let _attached = tracker.attach(cgroup.open()?)?;

    Peer::start(MANY, None, Some(&cgroup))?.finish()?;
    let many = ConnectionCounts { opened: 800, accepted: 800, failed: 0, closed: 1600 };
    expect(&tracker, many)
}

#[test]
fn a_connection_outside_the_cgroup_is_not_counted() -> Result<()> {
    require_tracker!();
    let (cgroup, beside) = (Cgroup::new()?, Cgroup::new()?);
    let (mut tracker, mut witness) = (Tracker::load()?, Tracker::load()?);
    let _attached = tracker.attach(cgroup.open()?)?;
    let _witnessing = witness.attach(beside.open()?)?;

    connect_once(&beside)?;
    expect(&witness, ConnectionCounts { opened: 1, closed: 1, ..NONE })?;
    ensure!(tracker.counts()? == NONE, "counted: {:?}", tracker.counts()?);
    Ok(())
}

#[test]
fn nothing_is_counted_after_detaching() -> Result<()> {
    require_tracker!();
    let cgroup = Cgroup::new()?;
    let (mut tracker, mut witness) = (Tracker::load()?, Tracker::load()?);
    let attached = tracker.attach(cgroup.open()?)?;

    connect_once(&cgroup)?;
    let once = ConnectionCounts { opened: 1, closed: 1, ..NONE };
    expect(&tracker, once)?;

    drop(attached);
    let _witnessing = witness.attach(cgroup.open()?)?;
    connect_once(&cgroup)?;
    expect(&witness, once)?;
    ensure!(tracker.counts()? == once, "still counting: {:?}", tracker.counts()?);
    Ok(())
}

#[test]
fn two_trackers_on_one_cgroup_both_count() -> Result<()> {
    require_tracker!();
    let cgroup = Cgroup::new()?;
    let (mut first, mut second) = (Tracker::load()?, Tracker::load()?);
    let _attached = (first.attach(cgroup.open()?)?, second.attach(cgroup.open()?)?);

    connect_once(&cgroup)?;
    let once = ConnectionCounts { opened: 1, closed: 1, ..NONE };
    expect(&first, once)?;
    expect(&second, once)
}

/// One connection out of a cgroup, from its opening to its end.
fn connect_once(cgroup: &Cgroup) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = Peer::start(CONNECT, Some(listener.local_addr()?), Some(cgroup))?;
    let (_server, _) = listener.accept()?;
    client.finish()
}

/// Waits for the counts to become what they should be: the kernel may take its time to bring an
/// ended connection to its end.
fn expect(tracker: &Tracker, wanted: ConnectionCounts) -> Result<()> {
    let mut counts = NONE;
    until_true("the counts", || {
        counts = tracker.counts()?;
        Ok(counts == wanted)
    })
    .with_context(|| format!("counted {counts:?} instead of {wanted:?}"))
}

/// Opens a connection, says so, and holds it until it is told to finish.
const CONNECT: &str = "
client = socket.create_connection((host, port))
print('connected', flush=True)
sys.stdin.read()";

/// Says where it listens, accepts one connection, and holds it until it is told to finish.
const ACCEPT: &str = "
listener = socket.create_server(('127.0.0.1', 0))
print('%s:%d' % listener.getsockname(), flush=True)
server, _ = listener.accept()
sys.stdin.read()";

/// Opens a connection that must be refused.
const BE_REFUSED: &str = "
try: socket.create_connection((host, port))
except ConnectionRefusedError: print('refused', flush=True)";

/// 800 connections to itself, eight at a time.
const MANY: &str = "
import threading
listener = socket.create_server(('127.0.0.1', 0), backlog=128)
def serve():
    for _ in range(800): listener.accept()[0].close()
def connect():
    for _ in range(100):
        client = socket.create_connection(listener.getsockname())
        client.recv(1)
        client.close()
threads = [threading.Thread(target=serve)] + [threading.Thread(target=connect) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print('done', flush=True)";

/// A process with sockets. Killed when dropped.
struct Peer {
    child: Child,
    /// The line it printed when it was ready.
    said: String,
}

impl Peer {
    /// Starts a script and waits for its line.
    fn start(script: &str, to: Option<SocketAddr>, cgroup: Option<&Cgroup>) -> Result<Self> {
        let target = match to {
            Some(address) => format!("host, port = '{}', {}", address.ip(), address.port()),
            None => String::new(),
        };
        let mut command = Command::new("python3");
        command.arg("-c").arg(format!("import socket, sys\n{target}{script}"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(cgroup) = cgroup {
            cgroup.start_in(&mut command)?;
        }
        let mut peer =
            Self { child: command.spawn().context("start a peer")?, said: String::new() };
        let stdout = peer.child.stdout.take().context("take the output of a peer")?;
        BufReader::new(stdout).read_line(&mut peer.said).context("wait for a peer")?;
        peer.said.truncate(peer.said.trim_end().len());
        ensure!(!peer.said.is_empty(), "a peer ended before it was ready");
        Ok(peer)
    }

    /// Tells it to finish, and waits until it has.
    fn finish(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait().context("wait for the end of a peer")?;
        ensure!(status.success(), "a peer ended with {status}");
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

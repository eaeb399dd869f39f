//! The ambassador with as little as a Pod gives it, and in front of people who wish it ill: whatever
//! they do, the data side goes on.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, spawn};

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::{Address, Family};
use ambassador_tests::ambassador::{Ambassador, Launch};
use ambassador_tests::echo::Echo;
use ambassador_tests::front::Front;
use ambassador_tests::http;
use ambassador_tests::noise::Noise;
use ambassador_tests::place::Place;
use ambassador_tests::pod::is_root;
use ambassador_tests::process::Process;
use ambassador_tests::skip;
use ambassador_tests::wait::{SOON, until_true};

/// The user that distroless images call `nonroot`.
const NOBODY_IN_PARTICULAR: u32 = 65532;

#[test]
fn any_user_without_a_capability_will_do() -> Result<()> {
    if !is_root() {
        skip!("only root can become another user");
    }
    let (echo, launch) = (Echo::new(Family::Tcp)?, Launch::new(&Place::here())?);
    let socket = Address::Unix(launch.directory().join("app.sock"));
    let port = Place::here().port()?;
    let ambassador = launch
        .route(format!("{port}={}", echo.address()))
        .route(format!("{socket}={}", echo.address()))
        .by_user(NOBODY_IN_PARTICULAR)?
        .start()?;
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    Address::from(loopback).connect()?.ask(b"hello", b"hello")?;
    socket.connect()?.ask(b"hello", b"hello")?;
    ensure!(status(&ambassador.process, "Uid:")?.contains("65532"), "it runs as somebody else");
    ambassador.end()
}

#[test]
fn a_root_that_can_only_be_read_will_do() -> Result<()> {
    if !is_root() {
        skip!("only root can make a mount namespace with a root that can only be read");
    }
    let (echo, launch) = (Echo::new(Family::Tcp)?, Launch::new(&Place::here())?);
    let directory = launch.directory().to_owned();
    let socket = Address::Unix(directory.join("app.sock"));
    // The directory stays writable, as a volume would; the rest of the file system does not.
    let script = r#"mount --bind "$0" "$0" && mount -o remount,bind,ro / &&
                    test ! -w /var && test -w "$0" && exec "$@""#;
    let directory = directory.to_str().context("read the directory's path")?;
    let ambassador = launch
        .route(format!("{socket}={}", echo.address()))
        .by_user(NOBODY_IN_PARTICULAR)?
        .under(&["unshare", "--mount", "--", "sh", "-c", script, directory])
        .start()?;
    socket.connect()?.ask(b"hello", b"hello")?;
    ambassador.end()
}

/// Root gives up what it does not need, in every thread.
#[test]
fn capabilities_that_are_not_needed_are_dropped() -> Result<()> {
    if !is_root() {
        skip!("only root has capabilities to drop");
    }
    let ambassador = Front::start(&[])?.ambassador;
    ensure!(status(&ambassador.process, "CapBnd:")?.trim() == "0000000000000000");
    let tasks = format!("/proc/{}/task", ambassador.process.id());
    for task in fs::read_dir(&tasks).with_context(|| format!("list {tasks}"))? {
        let path = task.context("read the list of threads")?.path();
        let status = fs::read_to_string(path.join("status")).context("read a thread's status")?;
        let name = fs::read_to_string(path.join("comm")).context("read a thread's name")?;
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            let line = status.lines().find(|line| line.starts_with(set)).context("find a set")?;
            ensure!(line.ends_with("0000000000000000"), "thread {}: {line}", name.trim());
        }
        ensure!(status.contains("NoNewPrivs:\t1"), "thread {} may gain privileges", name.trim());
    }
    let told = ambassador.log()?.into_iter().find(|line| line["message"] == "privileges");
    let told = told.context("find the line about privileges in the log")?;
    ensure!(told["needed"] == "none" && told["uid"] == 0, "{told}");
    Ok(())
}

#[test]
fn half_requests_hold_up_nobody() -> Result<()> {
    let pulse = Pulse::start()?;
    let mut half = Vec::new();
    for length in 0..500 {
        let request = b"GET /metrics HTTP/1.1\r\nHost: ambassador\r\n";
        let mut stream = caller(&pulse)?;
        // The server may have had enough of us: that is its right.
        let _ = stream.write_all(&request[..length % request.len()]);
        half.push(stream);
    }
    pulse.unharmed()?;
    drop(half);
    pulse.unharmed()
}

#[test]
fn thousands_of_admin_connections_hold_up_nobody() -> Result<()> {
    let pulse = Pulse::start()?;
    let before = pulse.descriptors()?;
    let mut held = Vec::new();
    for number in 0..2000 {
        held.push(caller(&pulse).with_context(|| format!("admin connection {number}"))?);
    }
    pulse.unharmed()?;
    drop(held);
    until_true("the admin connections to be closed", || Ok(pulse.descriptors()? <= before + 8))?;
    pulse.unharmed()
}

#[test]
fn huge_requests_are_refused() -> Result<()> {
    let pulse = Pulse::start()?;
    let endless_target = [b"GET /".to_vec(), vec![b'a'; 4 << 20]].concat();
    let endless_header = [b"GET / HTTP/1.1\r\nX: ".to_vec(), vec![b'a'; 4 << 20]].concat();
    let many_headers =
        [b"GET / HTTP/1.1\r\n".to_vec(), b"A: b\r\n".repeat(200_000), b"\r\n".to_vec()].concat();
    for request in [endless_target, endless_header, many_headers] {
        let answer = send(&pulse, &request)?;
        let refused = answer.is_empty() || answer.starts_with(b"HTTP/1.1 4");
        ensure!(refused, "answered: {:.200}", String::from_utf8_lossy(&answer));
        pulse.unharmed()?;
    }
    Ok(())
}

#[test]
fn garbage_is_refused() -> Result<()> {
    let pulse = Pulse::start()?;
    let mut noise = Noise::new(1);
    let tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec();
    let smuggling = b"GET / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nx";
    let cases =
        [noise.bytes(70_000), vec![0; 70_000], tls, b"\r\n".repeat(10_000), smuggling.to_vec()];
    for request in cases {
        let answer = send(&pulse, &request)?;
        ensure!(!answer.starts_with(b"HTTP/1.1 2"), "{:?} was welcome", request.first());
        pulse.unharmed()?;
    }
    Ok(())
}

#[test]
fn admin_http_changes_nothing() -> Result<()> {
    let pulse = Pulse::start()?;
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT"] {
        for path in ["/readyz", "/metrics", "/drain", "/shutdown"] {
            let answer = http::send(&Place::here(), pulse.ambassador().admin, method, path)?;
            ensure!((400..500).contains(&answer.status), "{method} {path}: {}", answer.status);
        }
    }
    let refusal = http::send(&Place::here(), pulse.ambassador().admin, "POST", "/readyz")?;
    ensure!(refusal.status == 405, "POST answers {}", refusal.status);
    ensure!(refusal.head.to_lowercase().contains("\r\nallow: get"), "{}", refusal.head);
    for path in ["/drain", "/shutdown", "/", "/../etc/passwd", "/metrics/../../x"] {
        ensure!(pulse.ambassador().get(path)?.status == 404, "GET {path}");
    }
    pulse.unharmed()
}

#[test]
fn the_control_socket_bears_hostility() -> Result<()> {
    let pulse = Pulse::start()?;
    let control = pulse.ambassador().control();
    let connect = || UnixStream::connect(&control).context("connect to the control socket");
    let cases = [
        Noise::new(2).bytes(100_000),
        vec![0; 10_000],
        [b"{\"command\":\"".to_vec(), vec![b'a'; 1 << 20]].concat(),
        b"{\"command\":\"shut-down\"}\n".to_vec(),
        b"{\"command\":\"drain\",\"now\":true}\n".to_vec(),
        vec![b'['; 4000],
        b"\n".to_vec(),
    ];
    for request in cases {
        let mut stream = connect()?;
        stream.set_read_timeout(Some(SOON)).context("bound the time of reading")?;
        // It may be refused before it has been sent in full.
        let _ = stream.write_all(&request);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        ensure!(answer.is_empty() || answer.contains("refused"), "answered {answer:.200}");
    }
    let held = (0..300).map(|_| connect()).collect::<Result<Vec<_>>>()?;
    pulse.ambassador().command(&["status"])?.success()?;
    drop(held);
    pulse.unharmed()
}

#[test]
fn hostile_clients_leave_nothing_behind() -> Result<()> {
    let pulse = Pulse::start()?;
    let before = pulse.descriptors()?;
    for round in 0..500 {
        let client = pulse.front.address.connect()?;
        match round % 3 {
            0 => client.reset()?,
            1 => client.say(b"never heard").and_then(|()| client.reset())?,
            _ => client.finish()?,
        }
    }
    until_true("their descriptors to be closed", || Ok(pulse.descriptors()? <= before + 8))?;
    pulse.unharmed()
}

/// A connection through an ambassador that never stops asking and being answered.
struct Pulse {
    front: Front,
    beats: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Pulse {
    fn start() -> Result<Self> {
        let front = Front::start(&[])?;
        let client = front.connect()?;
        let beats = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = spawn({
            let (beats, stop) = (Arc::clone(&beats), Arc::clone(&stop));
            move || {
                while !stop.load(Ordering::SeqCst) {
                    client.ask(b"ping", b"ping")?;
                    beats.fetch_add(1, Ordering::SeqCst);
                }
                Ok(())
            }
        });
        let pulse = Self { front, beats, stop, thread: Some(thread) };
        pulse.goes_on()?;
        Ok(pulse)
    }

    fn ambassador(&self) -> &Ambassador {
        &self.front.ambassador
    }

    /// The ambassador runs, is ready, answers, carries, and has not grown.
    fn unharmed(&self) -> Result<()> {
        self.goes_on()?;
        let ambassador = self.ambassador();
        let ready = ambassador.get("/readyz")?;
        ensure!(ready.status == 200, "/readyz answers {}", ready.status);
        self.front.connect()?;
        let panicked = ambassador.process.stderr().contains("panicked");
        ensure!(!panicked, "it panicked: {}", ambassador.process.stderr());
        let rss = ambassador.process.rss()?;
        ensure!(rss < 64 << 20, "it has grown to {} KiB", rss >> 10);
        Ok(())
    }

    fn descriptors(&self) -> Result<usize> {
        Ok(self.ambassador().process.descriptors()?.len())
    }

    /// Waits for a hundred more answers.
    fn goes_on(&self) -> Result<()> {
        let before = self.beats.load(Ordering::SeqCst);
        until_true("the data side to go on", || {
            Ok(self.beats.load(Ordering::SeqCst) >= before + 100)
        })
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // Whether it beats is asked before; at the end its ambassador may be gone already.
            let _ = thread.join();
        }
    }
}

fn caller(pulse: &Pulse) -> Result<TcpStream> {
    let stream =
        TcpStream::connect(pulse.ambassador().admin).context("connect to the admin port")?;
    stream.set_read_timeout(Some(SOON)).context("bound the time of reading")?;
    stream.set_write_timeout(Some(SOON)).context("bound the time of writing")?;
    Ok(stream)
}

/// Sends what may be refused at any point, and returns what came back before the close.
fn send(pulse: &Pulse, request: &[u8]) -> Result<Vec<u8>> {
    let mut stream = caller(pulse)?;
    let _ = stream.write_all(request);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            Err(error).context("wait for the admin port to close a hostile connection")
        }
        _ => Ok(answer),
    }
}

fn status(process: &Process, key: &str) -> Result<String> {
    let path = format!("/proc/{}/status", process.id());
    let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    line.map(str::to_owned).with_context(|| format!("find {key} in {path}"))
}

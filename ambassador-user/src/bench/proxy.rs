//! An ambassador that is measured: this binary, in a process of its own, with one route and one tier.
//!
//! It has no admin port and no control socket, nothing of our environment and an instance of its own, so
//! that an ambassador that runs beside it never notices. It ends with us, whatever ends us.

use std::io::{self, BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::config::{Cgroup, InFlight, Tier};
use crate::datapath::pins::Pins;

/// A start takes a tenth of a second; a machine that is busy gets more.
const START: Duration = Duration::from_secs(10);
/// For an end in order, which takes milliseconds, after which it is killed.
const END: Duration = Duration::from_secs(2);
/// Of its log, at most so many are kept that nobody has asked for.
const LINES: usize = 64;

/// A running ambassador; ended when dropped.
pub struct Proxy {
    child: Child,
    /// Its log: what it said of its trouble, or that it is ready.
    log: Receiver<Line>,
    instance: String,
    /// Where it listens.
    pub address: SocketAddr,
}

/// What of its log matters.
enum Line {
    Ready,
    Trouble(String),
}

impl Proxy {
    /// Starts one with a route to the upstream, and waits until it is in full service. The process ends
    /// with the calling thread.
    pub fn start(
        tier: Tier,
        cgroup: &Cgroup,
        inflight: InFlight,
        upstream: SocketAddr,
    ) -> Result<Self> {
        let address = free_address().context("find a free port")?;
        let instance = format!("bench-{}-{tier}", std::process::id());
        let mut command = Command::new("/proc/self/exe");
        command.arg0("ambassador").arg("run").env_clear();
        command.args(["--route", &format!("bench:{address}={upstream}")]);
        command.args(["--tier", &tier.to_string(), "--require", &tier.to_string()]);
        command.args(["--admin-http", "off", "--control", "off", "--instance", &instance]);
        command.args(["--inflight-bytes", &inflight.bytes.to_string()]);
        command.args(["--inflight-messages", &inflight.messages.to_string()]);
        command.args(["--drain-deadline", "1s"]);
        command.args(["--log-format", "json", "--log-level", "info,access=off"]);
        if let Cgroup::At(path) = cgroup {
            command.arg("--cgroup").arg(path);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // What interrupts us is not told to it as well: it is ended in order.
        command.process_group(0);
        let parent = std::process::id();
        // SAFETY: between fork and exec the closure makes two system calls and touches no memory.
        unsafe { command.pre_exec(move || end_with(parent)) };
        let mut child = command.spawn().context("start it")?;
        let stderr = child.stderr.take().context("read its log")?;
        let mut proxy = Self { child, log: follow(stderr), instance, address };
        proxy.wait_until_ready()?;
        Ok(proxy)
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it complained of last, if it complained or ended since this was last asked.
    pub fn trouble(&mut self) -> Option<String> {
        let said = self.log.try_iter().filter_map(Line::trouble).last();
        let ended = self.child.try_wait().ok().flatten();
        match (said, ended) {
            (said, None) => said,
            (said, Some(status)) => {
                Some(format!("it ended ({status}): {}", said.unwrap_or_default()))
            }
        }
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START;
        let mut trouble = None;
        loop {
            match self.log.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Line::Ready) => return Ok(()),
                Ok(Line::Trouble(said)) => trouble = Some(said),
                Err(RecvTimeoutError::Timeout) => bail!("it was not ready within {START:?}"),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("{}", trouble.unwrap_or_else(|| "it ended without a word".to_owned()))
                }
            }
        }
    }

    fn end(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        // SAFETY: kill(2) takes numbers; the child is not reaped yet, so the pid is still its own.
        unsafe { libc::kill(self.child.id().cast_signed(), libc::SIGTERM) };
        let deadline = Instant::now() + END;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                // What it could not take back itself.
                Pins::all(&self.instance)?.into_iter().try_for_each(Pins::remove)?;
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("ambassador: cannot end process {}: {error:#}", self.child.id());
        }
    }
}

impl Line {
    fn read(line: &str) -> Option<Self> {
        // Before there is a log, a refusal is plain text.
        let Ok(said) = serde_json::from_str::<Value>(line) else {
            return Some(Self::Trouble(line.trim_start_matches("ambassador: ").to_owned()));
        };
        let message = said["message"].as_str()?;
        match said["level"].as_str()? {
            "INFO" => (message == "ready").then_some(Self::Ready),
            _ => Some(Self::Trouble(message.to_owned())),
        }
    }

    fn trouble(self) -> Option<String> {
        match self {
            Self::Ready => None,
            Self::Trouble(said) => Some(said),
        }
    }
}

/// Reads the log until its end, so that its writer never waits for a reader.
fn follow(log: impl Read + Send + 'static) -> Receiver<Line> {
    let (lines, read) = sync_channel(LINES);
    thread::spawn(move || {
        let all = BufReader::new(log).lines().map_while(Result::ok);
        for line in all.filter_map(|line| Line::read(&line)) {
            // Who complains so much has said enough.
            let _ = lines.try_send(line);
        }
    });
    read
}

/// Has the calling process told to end when its parent, which is this one, ends.
fn end_with(parent: u32) -> io::Result<()> {
    // SAFETY: this prctl(2) takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // It may have ended before that.
    if std::os::unix::process::parent_id() != parent {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    Ok(())
}

/// One that nobody listens on now, and that the kernel gives to nobody soon.
fn free_address() -> io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

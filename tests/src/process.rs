//! A process that a test started: its output is kept for failure messages, every wait is bounded,
//! and it is gone when the test is.

use std::fs;
use std::io::{ErrorKind, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::family;
use crate::wait::until;

/// How long output may trickle in after the process that wrote it has ended.
const TRAILING_OUTPUT: Duration = Duration::from_secs(2);

/// A running process, killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdout: Output,
    stderr: Output,
}

/// A process that has ended by itself.
#[derive(Debug)]
pub struct Finished {
    name: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All it wrote to its standard output.
    pub stdout: String,
    /// All it wrote to its standard error.
    pub stderr: String,
}

impl Process {
    /// Starts `command` with its output captured and nothing to read.
    pub fn start(command: &mut Command) -> Result<Self> {
        let name = shown(command);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start `{name}`"))?;
        let stdout = Output::of(child.stdout.take().context("take the standard output")?);
        let stderr = Output::of(child.stderr.take().context("take the standard error")?);
        Ok(Self { name, child, stdout, stderr })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to its standard output so far.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// What it has written to its standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("look after `{}`", self.name))
    }

    /// An error with its output when it has ended, which a server must not do by itself.
    pub fn still_runs(&mut self) -> Result<()> {
        let ended = self.ended()?;
        ensure!(ended.is_none(), "`{}` ended ({ended:?}): {}", self.name, self.stderr());
        Ok(())
    }

    /// Sends it a signal, by its id.
    pub fn signal(&self, signal: libc::c_int) -> Result<()> {
        // SAFETY: no memory is involved, and the id is that of our own child: it stays taken until
        // the child is waited for, which needs `self` exclusively.
        let sent = unsafe { libc::kill(self.child.id().cast_signed(), signal) };
        ensure!(
            sent == 0,
            "send signal {signal} to `{}`: {}",
            self.name,
            std::io::Error::last_os_error()
        );
        Ok(())
    }

    /// Sends a signal to it, and then to all that it has started.
    pub fn signal_family(&self, signal: libc::c_int) -> Result<()> {
        let family = family::of(self.id());
        self.signal(signal)?;
        for member in &family[1..] {
            // SAFETY: no memory is involved. One that has ended needs no signal.
            unsafe { libc::kill(member.cast_signed(), signal) };
        }
        Ok(())
    }

    /// Waits until it ends by itself; past `within` it is killed and that is an error.
    pub fn finish(mut self, within: Duration) -> Result<Finished> {
        let what = format!("the end of `{}`", self.name);
        let status = until(&what, within, || self.ended()).with_context(|| {
            format!("its output was: {}\nits errors: {}", self.stdout(), self.stderr())
        })?;
        self.stdout.complete()?;
        self.stderr.complete()?;
        let (stdout, stderr) = (self.stdout(), self.stderr());
        Ok(Finished { name: std::mem::take(&mut self.name), status, stdout, stderr })
    }

    /// What its open descriptors refer to, such as `socket:[4711]`.
    pub fn descriptors(&self) -> Result<Vec<String>> {
        let path = format!("/proc/{}/fd", self.id());
        let entries = fs::read_dir(&path).with_context(|| format!("list {path}"))?;
        // One that is closed between being listed and being read is not open any more.
        let targets = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
        Ok(targets.map(|target| target.to_string_lossy().into_owned()).collect())
    }

    /// Resident memory in bytes.
    pub fn rss(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.id());
        let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let kibibytes: u64 = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|value| value.trim().strip_suffix(" kB"))
            .with_context(|| format!("find VmRSS in {path}"))?
            .parse()
            .with_context(|| format!("parse VmRSS of {path}"))?;
        Ok(kibibytes * 1024)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself; there is nobody to tell about any other failure.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// The exit code; `None` when a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Its standard output, if it says it succeeded; otherwise an error with all it wrote.
    pub fn success(self) -> Result<String> {
        ensure!(
            self.status.success(),
            "`{}` failed ({}): {}{}",
            self.name,
            self.status,
            self.stdout,
            self.stderr
        );
        Ok(self.stdout)
    }
}

/// Runs `command` to its end, and returns its standard output if it succeeds.
pub fn run(command: &mut Command, within: Duration) -> Result<String> {
    Process::start(command)?.finish(within)?.success()
}

/// What a process writes to one of its outputs, collected as it comes.
#[derive(Debug)]
struct Output {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Output {
    fn of(mut pipe: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let reader = std::thread::spawn({
            let bytes = Arc::clone(&bytes);
            move || {
                let mut chunk = [0; 8192];
                loop {
                    match pipe.read(&mut chunk) {
                        Ok(0) => break,
                        Ok(read) => bytes
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .extend_from_slice(&chunk[..read]),
                        Err(error) if error.kind() == ErrorKind::Interrupted => {}
                        Err(_) => break,
                    }
                }
            }
        });
        Self { bytes, reader }
    }

    fn text(&self) -> String {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the last writer has closed its end.
    fn complete(&self) -> Result<()> {
        until("the end of the output", TRAILING_OUTPUT, || {
            Ok(self.reader.is_finished().then_some(()))
        })
    }
}

fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

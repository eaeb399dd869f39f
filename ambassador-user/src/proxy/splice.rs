//! The `splice` carrier: bytes pass through a pipe as references to kernel pages (splice(2)).
//!
//! Pipes are lent by a pool only while bytes move. The pool is bounded because the kernel counts a
//! user's pipe pages over all processes and containers (`fs.pipe-user-pages-soft`, 16384) and cuts the
//! pipes of whoever is over it down to two pages. A direction that gets no pipe goes on copying.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

use super::socket::Pulled;

/// Pages of 4 KiB that a pipe may refer to at once: a quarter of the soft limit for the whole pool.
const PIPE_BYTES: libc::c_int = 256 * 1024;
/// Pipes lent and idle together.
const MOST_PIPES: usize = 64;
/// Idle pipes kept for the next direction that turns busy.
const MOST_IDLE: usize = 16;

/// Lends pipes, and never more than [`MOST_PIPES`].
#[derive(Debug, Default)]
pub struct PipePool(Mutex<Stock>);

#[derive(Debug, Default)]
struct Stock {
    idle: Vec<Ends>,
    lent: usize,
}

/// A pipe on loan. Given back empty it is used again; with bytes in it, it is closed.
#[derive(Debug)]
pub struct Pipe {
    ends: Option<Ends>,
    held: usize,
    pool: Arc<PipePool>,
}

#[derive(Debug)]
struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

impl PipePool {
    /// A pipe, unless all are lent or the system has none.
    pub fn lend(self: &Arc<Self>) -> Option<Pipe> {
        let mut stock = self.stock();
        if stock.lent == MOST_PIPES {
            return None;
        }
        let ends = match stock.idle.pop() {
            Some(ends) => ends,
            None => Ends::new().ok()?,
        };
        stock.lent += 1;
        Some(Pipe { ends: Some(ends), held: 0, pool: Arc::clone(self) })
    }

    fn stock(&self) -> std::sync::MutexGuard<'_, Stock> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pipe {
    pub fn held(&self) -> usize {
        self.held
    }

    /// Takes what `from` has and passes on to `to` what it accepts right away. Nothing may be held:
    /// only then does EAGAIN mean that `from` is empty, and not that the pipe is full.
    pub fn pull(&mut self, from: RawFd, to: RawFd) -> io::Result<Pulled> {
        let taken = splice(from, self.ends().write.as_raw_fd(), PIPE_BYTES as usize)?;
        self.held = taken;
        // Whatever the error is, the next `push` meets it again, where it has a side to blame.
        let passed = if taken == 0 { 0 } else { self.push(to).unwrap_or(0) };
        // A pipe is full by pages, not by bytes: getting less says nothing about the sender.
        Ok(Pulled { taken, passed, short: false })
    }

    /// Passes on what is held.
    pub fn push(&mut self, to: RawFd) -> io::Result<usize> {
        let passed = splice(self.ends().read.as_raw_fd(), to, self.held)?;
        self.held -= passed;
        Ok(passed)
    }

    fn ends(&self) -> &Ends {
        self.ends.as_ref().expect("a pipe has its ends until it is dropped")
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let mut stock = self.pool.stock();
        stock.lent -= 1;
        if self.held == 0 && stock.idle.len() < MOST_IDLE {
            stock.idle.extend(self.ends.take());
        }
    }
}

/// Whether pipes may be used here: a seccomp profile or a sandboxed kernel can refuse splice(2).
/// Moves real bytes from a socket through a pipe into another socket.
pub fn probe() -> Result<()> {
    const BYTES: &[u8] = b"through a pipe";
    let (mut writer, from) = UnixStream::pair().context("make a pair of sockets")?;
    let (to, mut reader) = UnixStream::pair().context("make a pair of sockets")?;
    writer.write_all(BYTES).context("write to a socket")?;
    let mut pipe = Arc::<PipePool>::default().lend().context("no pipe can be made")?;
    let moved = pipe.pull(from.as_raw_fd(), to.as_raw_fd()).context("splice(2) is refused")?;
    drop(to);
    let mut arrived = Vec::new();
    reader.read_to_end(&mut arrived).context("read from a socket")?;
    ensure!(moved.passed == BYTES.len() && arrived == BYTES, "splice(2) does not move bytes");
    Ok(())
}

impl Ends {
    fn new() -> io::Result<Self> {
        let mut fds = [0; 2];
        // SAFETY: pipe2(2) writes two descriptors into the array.
        if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: pipe2(2) has just made this descriptor, and nobody else has it.
        let read = unsafe { OwnedFd::from_raw_fd(fds[0]) };
        // SAFETY: as above.
        let write = unsafe { OwnedFd::from_raw_fd(fds[1]) };
        // Over the user's limit the pipe stays small, which costs speed and nothing else.
        // SAFETY: fcntl(2) with an integer argument touches no memory.
        unsafe { libc::fcntl(write.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_BYTES) };
        Ok(Self { read, write })
    }
}

fn splice(from: RawFd, to: RawFd, most: usize) -> io::Result<usize> {
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    let none = std::ptr::null_mut();
    // SAFETY: without offsets splice(2) touches no memory of this process.
    let moved = unsafe { libc::splice(from, none, to, none, most, flags) };
    usize::try_from(moved).map_err(|_negative| io::Error::last_os_error())
}

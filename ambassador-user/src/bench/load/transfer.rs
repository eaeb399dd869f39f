//! Bulk, one way, as fast as it goes; every byte is checked where it arrives.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Target;
use crate::bench::upstream::{self, DOWNLOAD, UPLOAD};

/// Which way bytes go, as the client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the upstream.
    Up,
    /// From the upstream.
    Down,
}

/// What a transfer took.
pub struct Moved<R> {
    /// From before the first connection until the last byte is known to be right.
    pub took: Duration,
    /// What was read before and after.
    pub spent: (R, R),
}

/// Moves `bytes`, divided among `streams` connections that each have a thread.
pub fn run<T: Target>(
    target: &T,
    direction: Direction,
    bytes: u64,
    streams: u16,
) -> Result<Moved<T::Reading>> {
    let one = match direction {
        Direction::Up => upload,
        Direction::Down => download,
    };
    let before = target.read()?;
    let start = Instant::now();
    thread::scope(|scope| {
        let moves = |stream| {
            let address = target.address(usize::from(stream));
            scope.spawn(move || one(address, bytes / u64::from(streams)))
        };
        let streams: Vec<_> = (0..streams).map(moves).collect();
        streams.into_iter().try_for_each(|stream| stream.join().expect("a client does not panic"))
    })?;
    Ok(Moved { took: start.elapsed(), spent: (before, target.read()?) })
}

/// Sends `bytes`, and waits for the answer that they have all arrived.
fn upload(address: SocketAddr, bytes: u64) -> Result<()> {
    let mut stream = super::connect(address)?;
    stream.write_all(&request(UPLOAD, bytes)).context("announce an upload")?;
    stream.read_exact(&mut [0]).context("wait for the start of an upload")?;
    upstream::pour(&mut stream, bytes).context("send an upload")?;
    let mut right = [0; 8];
    stream.read_exact(&mut right).context("receive the answer to an upload")?;
    let right = u64::from_le_bytes(right);
    ensure!(right == bytes, "byte {right} of the upload arrived wrong");
    Ok(())
}

/// Fetches `bytes`.
fn download(address: SocketAddr, bytes: u64) -> Result<()> {
    let mut stream = super::connect(address)?;
    stream.write_all(&request(DOWNLOAD, bytes)).context("ask for a download")?;
    let right = upstream::swallow(&mut stream, bytes).context("receive a download")?;
    ensure!(right == bytes, "byte {right} of the download arrived wrong");
    Ok(())
}

fn request(what: u8, length: u64) -> [u8; 9] {
    let mut request = [what; 9];
    request[1..].copy_from_slice(&length.to_le_bytes());
    request
}

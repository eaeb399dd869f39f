//! One connection, one way, as fast as it goes; every byte is checked where it arrives.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::bench::upstream::{self, DOWNLOAD, UPLOAD};

/// Sends `bytes` and returns how long that took, up to the answer that they have all arrived.
pub(crate) fn upload(address: SocketAddr, bytes: u64) -> Result<Duration> {
    let mut stream = super::connect(address)?;
    stream.write_all(&request(UPLOAD, bytes)).context("announce an upload")?;
    stream.read_exact(&mut [0]).context("wait for the start of an upload")?;

    let start = Instant::now();
    upstream::pour(&mut stream, bytes).context("send an upload")?;
    let mut right = [0; 8];
    stream.read_exact(&mut right).context("receive the answer to an upload")?;
    let took = start.elapsed();

    let right = u64::from_le_bytes(right);
    ensure!(right == bytes, "byte {right} of the upload arrived wrong");
    Ok(took)
}

/// Fetches `bytes` and returns how long that took.
pub(crate) fn download(address: SocketAddr, bytes: u64) -> Result<Duration> {
    let mut stream = super::connect(address)?;
    let start = Instant::now();
    stream.write_all(&request(DOWNLOAD, bytes)).context("ask for a download")?;
    let right = upstream::swallow(&mut stream, bytes).context("receive a download")?;
    ensure!(right == bytes, "byte {right} of the download arrived wrong");
    Ok(start.elapsed())
}

fn request(what: u8, length: u64) -> [u8; 9] {
    let mut request = [what; 9];
    request[1..].copy_from_slice(&length.to_le_bytes());
    request
}

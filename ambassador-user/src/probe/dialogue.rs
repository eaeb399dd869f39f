//! What is said to a server and what is heard of it, which is bounded, as a server may be hostile.

use anyhow::{Context, Result, bail};
use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::config::one_line;

/// The most bytes that are read from one server: any answer that is waited for is a small part of it.
const MOST: usize = 16 << 10;

/// A talk with one server. Dropping it closes the connection.
pub(super) struct Dialogue<S> {
    stream: S,
    heard: BytesMut,
    /// How many bytes may still be read.
    left: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Dialogue<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, heard: BytesMut::new(), left: MOST }
    }

    pub(super) async fn say(&mut self, words: &[u8]) -> Result<()> {
        self.stream.write_all(words).await.context("send")
    }

    /// What was heard and not yet taken.
    pub(super) fn heard(&mut self) -> &mut BytesMut {
        &mut self.heard
    }

    /// Hears at least one byte more.
    pub(super) async fn hear(&mut self) -> Result<()> {
        if self.left == 0 {
            bail!("it said more than {} KiB: {}", MOST >> 10, words(&self.heard));
        }
        let most = self.left as u64;
        match (&mut self.stream).take(most).read_buf(&mut self.heard).await.context("hear")? {
            0 if self.heard.is_empty() => bail!("it closed the connection without an answer"),
            0 => bail!("it closed the connection after {}", words(&self.heard)),
            some => self.left -= some,
        }
        Ok(())
    }

    /// Hears until there are `length` bytes, and shows them.
    pub(super) async fn peek(&mut self, length: usize) -> Result<&[u8]> {
        while self.heard.len() < length {
            self.hear().await?;
        }
        Ok(&self.heard[..length])
    }

    /// Hears `length` bytes, and takes them.
    pub(super) async fn take(&mut self, length: usize) -> Result<BytesMut> {
        self.peek(length).await?;
        Ok(self.heard.split_to(length))
    }

    /// Hears and takes a line, without its end.
    pub(super) async fn line(&mut self) -> Result<BytesMut> {
        let mut seen = 0;
        loop {
            if let Some(end) = self.heard[seen..].iter().position(|byte| *byte == b'\n') {
                let mut line = self.heard.split_to(seen + end);
                self.heard.advance(1);
                if line.last() == Some(&b'\r') {
                    line.truncate(line.len() - 1);
                }
                return Ok(line);
            }
            seen = self.heard.len();
            self.hear().await?;
        }
    }
}

/// A server's words as they may stand in an error: one line, shortened.
pub(super) fn words(said: &[u8]) -> String {
    const LONGEST: usize = 200;
    let more = if said.len() > LONGEST { "..." } else { "" };
    let shown = String::from_utf8_lossy(&said[..said.len().min(LONGEST)]);
    format!("{}{more}", one_line(shown.trim()))
}

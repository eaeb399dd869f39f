//! HTTP/1.1 in plain text: the status of the answer to a GET.

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncRead, AsyncWrite};

use super::dialogue::{Dialogue, words};
use crate::config::AskHttp;

pub(super) async fn ask<S>(ask: &AskHttp, label: &str, mut server: Dialogue<S>) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let host = match &ask.host {
        Some(host) => host,
        // As curl says of a Unix socket.
        None if label.starts_with("unix:") => "localhost",
        None => label,
    };
    let version = env!("CARGO_PKG_VERSION");
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: ambassador/{version}\r\nConnection: close\r\n\r\n",
        ask.path
    );
    server.say(request.as_bytes()).await?;
    let line = server.line().await?;
    let status =
        status(&line).with_context(|| format!("not an answer of HTTP: {}", words(&line)))?;
    ensure!(ask.status.0.contains(&status), "status {status}, expected {}", ask.status);
    Ok(())
}

/// The code of `HTTP/1.1 200 OK`, where the reason may be missing.
fn status(line: &[u8]) -> Option<u16> {
    let rest = line.strip_prefix(b"HTTP/1.")?;
    let [b'0'..=b'9', b' ', code @ ..] = rest else { return None };
    let (code, reason) = code.split_at_checked(3)?;
    let code = std::str::from_utf8(code).ok()?.parse().ok()?;
    (reason.is_empty() || reason.starts_with(b" ")).then_some(code)
}

//! The smallest HTTP client: one request, one connection, one answer.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result};

use crate::place::Place;
use crate::wait::SOON;

/// What a server answered.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The head, as it came.
    pub head: String,
    /// The body.
    pub body: String,
}

/// Sends `GET path` to `address`, from `place`.
pub fn get(place: &Place, address: SocketAddr, path: &str) -> Result<Answer> {
    send(place, address, "GET", path)
}

/// Sends a request without a body to `address`, from `place`.
pub fn send(place: &Place, address: SocketAddr, method: &str, path: &str) -> Result<Answer> {
    let context = || format!("{method} http://{address}{path}");
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    );
    let reply = place.enter(|| exchange(address, request.as_bytes())).with_context(context)?;
    parse(&reply).with_context(context)
}

fn exchange(address: SocketAddr, request: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(address).context("connect")?;
    stream.set_read_timeout(Some(SOON)).context("bound the time of reading")?;
    stream.write_all(request).context("send the request")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).context("receive the answer")?;
    Ok(reply)
}

fn parse(reply: &str) -> Result<Answer> {
    let (head, body) = reply.split_once("\r\n\r\n").context("find the end of the head")?;
    let status = head
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3))
        .and_then(|code| code.parse().ok())
        .with_context(|| format!("find a status in {head:?}"))?;
    Ok(Answer { status, head: head.into(), body: body.into() })
}

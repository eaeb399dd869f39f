//! Start ordering: waits until the ambassador says that it is up.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Between two questions.
const PAUSE: Duration = Duration::from_millis(50);
/// For one answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// It has bound its routes.
    Started,
    /// And it is not about to end.
    Ready,
}

/// Returns when the ambassador at `admin` has come so far; an error after `timeout`.
pub fn wait(admin: SocketAddr, until: Until, timeout: Duration) -> Result<()> {
    let path = match until {
        Until::Started => "/startupz",
        Until::Ready => "/readyz",
    };
    let deadline = Instant::now() + timeout;
    loop {
        let Err(error) = ask(admin, path) else { return Ok(()) };
        if Instant::now() + PAUSE >= deadline {
            let timeout = humantime::format_duration(timeout);
            return Err(error.context(format!(
                "the ambassador at http://{admin}{path} was not up within {timeout}"
            )));
        }
        sleep(PAUSE);
    }
}

fn ask(admin: SocketAddr, path: &str) -> Result<()> {
    let mut socket = TcpStream::connect_timeout(&admin, PATIENCE).context("connect")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    write!(socket, "GET {path} HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    socket.take(4096).read_to_string(&mut answer).context("read the answer")?;
    match answer.split_whitespace().nth(1) {
        Some("200") => Ok(()),
        Some(status) => bail!("it answers {status}"),
        None => bail!("it does not answer in HTTP"),
    }
}

//! Reaching an upstream: over its endpoints, over an endpoint's addresses, each step bounded.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use socket2::{Domain, SockAddr, Type};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

use super::shortcut::Shortcuts;
use super::socket::{Family, Socket, tune_tcp};
use crate::upstream::{Lease, Reach, Upstream};

/// How long an address may be silent before the next one is tried beside it (RFC 8305).
const FALLBACK: Duration = Duration::from_millis(250);
/// A full Unix backlog gives no event to wait for.
const UNIX_BACKLOG: Duration = Duration::from_millis(5);

/// An established connection to an upstream.
pub struct Connected {
    pub socket: Socket,
    pub lease: Lease,
}

/// Who connects.
#[derive(Debug, Clone)]
pub enum As {
    /// An ambassador: the connect hooks leave its sockets alone, and whoever offers shortcuts is shown them.
    Ambassador(Option<Arc<dyn Shortcuts>>),
    /// An app like any other.
    App,
}

/// Tries endpoints as the upstream's policy orders them: each at most once, at most `attempts` of
/// them, each within `timeout`.
pub async fn connect(upstream: &Upstream, who: &As) -> Result<Connected> {
    let mut tried = Vec::new();
    let mut failures = Vec::new();
    for _ in 0..upstream.connect.attempts.get() {
        let Some((index, lease)) = upstream.choose(&tried) else { break };
        let deadline = Instant::now() + upstream.connect.timeout;
        match timeout_at(deadline, reach(&lease, who)).await.unwrap_or_else(|_elapsed| {
            Err(anyhow!(
                "no answer within {}",
                humantime::format_duration(upstream.connect.timeout)
            ))
        }) {
            Ok(socket) => return Ok(Connected { socket, lease }),
            Err(error) => {
                failures.push(format!("{}: {error:#}", lease.endpoint().label()));
                tried.push(index);
            }
        }
    }
    Err(anyhow!("{}", failures.join("; ")))
}

async fn reach(lease: &Lease, who: &As) -> Result<Socket> {
    match lease.endpoint().reach().await? {
        Reach::Unix(path) => unix(&path).await.context("connect"),
        Reach::Tcp(addresses) => match addresses[..] {
            [address] => tcp(address, who).await.with_context(|| format!("connect to {address}")),
            _ => fastest(addresses, who).await,
        },
    }
}

/// Tries the addresses in order, the next one beside the last when that fails or stays silent.
async fn fastest(addresses: Vec<SocketAddr>, who: &As) -> Result<Socket> {
    let mut waiting = addresses.into_iter();
    let mut racing = JoinSet::new();
    let mut failure = anyhow!("no address");
    loop {
        if let Some(address) = waiting.next() {
            let who = who.clone();
            racing.spawn(async move {
                tcp(address, &who).await.with_context(|| format!("connect to {address}"))
            });
        }
        let ended = if waiting.len() > 0 {
            tokio::select! {
                ended = racing.join_next() => ended,
                () = sleep(FALLBACK) => continue,
            }
        } else {
            racing.join_next().await
        };
        match ended {
            Some(Ok(Ok(socket))) => return Ok(socket),
            Some(Ok(Err(error))) => failure = error,
            Some(Err(error)) => failure = error.into(),
            None => return Err(failure),
        }
    }
}

async fn tcp(address: SocketAddr, who: &As) -> io::Result<Socket> {
    let socket = stream(Domain::for_address(address))?;
    tune_tcp(&socket)?;
    if let As::Ambassador(shortcuts) = who {
        if let Some(shortcuts) = shortcuts {
            shortcuts.prepare(socket.as_fd());
        }
        if address.ip().is_loopback() {
            mark_as_ours(&socket, address.ip())?;
        }
    }
    let target = address.into();
    // Asked again, connect(2) tells how far it is. Within a node the handshake is over by the time the
    // first call returns, and so is this: no timer, no event, no further question.
    let progress = match socket.connect(&target) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => socket.connect(&target),
        other => other,
    };
    match progress {
        Ok(()) => Socket::new(socket, Family::Tcp),
        Err(error) if error.raw_os_error() == Some(libc::EALREADY) => {
            let socket = Socket::new(socket, Family::Tcp)?;
            socket.connected().await?;
            Ok(socket)
        }
        Err(error) => Err(error),
    }
}

/// The connect hooks leave a socket alone whose source has been chosen. One that goes elsewhere than to
/// loopback is none of their business.
fn mark_as_ours(socket: &socket2::Socket, source: IpAddr) -> io::Result<()> {
    // Else the port is chosen now, and no other connection may share it.
    let (level, option) = (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT);
    let on: libc::c_int = 1;
    // SAFETY: the pointer is to `on`, whose size is given.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    socket.bind(&SocketAddr::new(source, 0).into())
}

async fn unix(path: &Path) -> io::Result<Socket> {
    let address = SockAddr::unix(path)?;
    loop {
        let socket = stream(Domain::UNIX)?;
        match socket.connect(&address) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(UNIX_BACKLOG).await,
            Err(error) => return Err(error),
            Ok(()) => return Socket::new(socket, Family::Unix),
        }
    }
}

fn stream(domain: Domain) -> io::Result<socket2::Socket> {
    // Both flags in the one call of socket(2).
    socket2::Socket::new_raw(domain, Type::STREAM.nonblocking().cloexec(), None)
}

//! One listen address: bound before anything is declared ready, accepting once the runtime runs.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use socket2::{Domain, SockAddr, SockAddrStorage, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::connection::Peer;
use super::port_owner;
use super::socket::{Family, Socket, register, tune_tcp};
use crate::config::Listen;
use crate::throttle::Throttle;

/// The kernel cuts it to `net.core.somaxconn`.
const BACKLOG: libc::c_int = 4096;
/// Without descriptors or memory there is nothing to do but wait for connections to end.
const PAUSE_WHEN_EXHAUSTED: Duration = Duration::from_millis(50);

/// The number of an interface that does not exist.
static NOWHERE: libc::c_int = libc::c_int::MAX;

/// An address that is ours: clients can connect, nobody accepts yet.
#[derive(Debug)]
pub struct Bound {
    socket: socket2::Socket,
    name: Name,
}

/// A bound address on the runtime.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<socket2::Socket>,
    name: Name,
    /// Keeps "cannot accept" from filling the log.
    exhausted: Throttle,
}

#[derive(Debug)]
enum Name {
    Tcp(SocketAddr),
    Unix(SocketFile),
}

/// A socket in the file system, removed when dropped if it is still the one we made.
#[derive(Debug)]
struct SocketFile {
    path: Arc<Path>,
    inode: u64,
}

/// Binds `listen`, be it beside a listener of ours that [shares its port](Listener::share_port); `None`
/// for an optional address that this Pod does not have.
pub fn bind(listen: &Listen, socket_mode: u32, beside: bool) -> Result<Option<Bound>> {
    match listen {
        Listen::Tcp { address, if_available } => match tcp(*address, beside) {
            Ok(socket) => Ok(Some(Bound { socket, name: Name::Tcp(*address) })),
            Err(error) if *if_available && is_missing_family(&error) => {
                info!("{address} does not exist here, so only IPv4 is listened on");
                Ok(None)
            }
            Err(error) => Err(explain(error, *address)),
        },
        Listen::Unix(path) => unix(path, socket_mode).map(Some),
    }
}

fn tcp(address: SocketAddr, beside: bool) -> io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // A restart must not wait for the connections of the last run to leave TIME_WAIT.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // [::]:P and 0.0.0.0:P are two addresses, as written.
        socket.set_only_v6(true)?;
    }
    tune_tcp(&socket)?;
    socket.set_reuse_port(beside)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_reuse_port(false)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn unix(path: &Path, mode: u32) -> Result<Bound> {
    let shown = path.display();
    remove_stale(path)?;
    let address = SockAddr::unix(path).with_context(|| format!("listen on unix:{shown}"))?;
    let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None).context("make a socket")?;
    socket.bind(&address).with_context(|| format!("listen on unix:{shown}"))?;
    let file = SocketFile {
        path: path.into(),
        inode: fs::metadata(path).with_context(|| format!("look at {shown}"))?.ino(),
    };
    // Nobody can connect before listen(2), so there is no moment with another mode.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("set the mode of {shown}"))?;
    socket.listen(BACKLOG).with_context(|| format!("listen on unix:{shown}"))?;
    socket.set_nonblocking(true).context("make the socket non-blocking")?;
    Ok(Bound { socket, name: Name::Unix(file) })
}

/// Removes what a killed run left behind, and nothing else.
fn remove_stale(path: &Path) -> Result<()> {
    let shown = path.display();
    let Ok(found) = fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        bail!(
            "listen on unix:{shown}: a file that is not a socket is there; remove it or choose another path"
        );
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            info!("removing {shown}, which nobody listens on any more");
            fs::remove_file(path).with_context(|| format!("remove the stale socket {shown}"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(_) => bail!(
            "listen on unix:{shown}: another process listens there; stop it or choose another path"
        ),
        Err(error) => {
            Err(error).with_context(|| format!("see whether anybody listens on unix:{shown}"))
        }
    }
}

impl Bound {
    /// Registers the socket with the current runtime.
    pub fn listen(self) -> io::Result<Listener> {
        let socket = register(self.socket, Interest::READABLE)?;
        Ok(Listener { socket, name: self.name, exhausted: Throttle::default() })
    }
}

impl Listener {
    /// The next connection. What keeps it from being accepted is waited out here: there is nothing
    /// else that a caller could do.
    pub async fn accept(&self) -> (Socket, Peer) {
        loop {
            match self.try_accept().await {
                Ok(connection) => return connection,
                Err(error) if is_the_peers(&error) => debug!("accept on {self}: {error}"),
                Err(error) => {
                    if self.exhausted.say_now().is_some() {
                        warn!(
                            "cannot accept on {self}: {error}; new connections wait (raise the \
                             limit of open files, or lower max_connections)"
                        );
                    }
                    sleep(PAUSE_WHEN_EXHAUSTED).await;
                }
            }
        }
    }

    /// Refuses new connections from now on, while handshakes that have begun go on and the queue stays. Without
    /// that, some would be let in after the queue has been looked at, only to be reset.
    pub fn let_nobody_in(&self) {
        let kept_out = match &self.name {
            Name::Tcp(_) => listen_nowhere(self.socket.get_ref()),
            Name::Unix(file) => file.remove(),
        };
        if let Err(error) = kept_out {
            debug!("keep new connections from {self}: {error}");
        }
    }

    /// Whether another listener of this user may be bound to this port too, as happens when one takes the
    /// place of another. Where nobody is about to, nobody may; but of this the kernel remembers, as long as the
    /// port is in use, that sockets of the same user and address were willing.
    pub fn share_port(&self, share: bool) -> io::Result<()> {
        match self.name {
            Name::Tcp(_) => self.socket.get_ref().set_reuse_port(share),
            Name::Unix(_) => Ok(()),
        }
    }

    /// Changes the mode of a Unix socket.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        match &self.name {
            Name::Tcp(_) => Ok(()),
            Name::Unix(file) => fs::set_permissions(&file.path, fs::Permissions::from_mode(mode)),
        }
    }

    async fn try_accept(&self) -> io::Result<(Socket, Peer)> {
        self.connection(self.socket.async_io(Interest::READABLE, accept).await?)
    }

    fn connection(&self, accepted: (socket2::Socket, SockAddr)) -> io::Result<(Socket, Peer)> {
        let (socket, address) = accepted;
        let (family, peer) = match (&self.name, address.as_socket()) {
            (Name::Unix(file), _) => (Family::Unix, Peer::Unix(Arc::clone(&file.path))),
            (Name::Tcp(_), Some(address)) => (Family::Tcp, Peer::Tcp(address)),
            (Name::Tcp(address), None) => (Family::Tcp, Peer::Tcp(*address)),
        };
        Ok((Socket::accepted(socket, family)?, peer))
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(file) => write!(f, "unix:{}", file.path.display()),
        }
    }
}

impl SocketFile {
    fn remove(&self) -> io::Result<()> {
        // A successor may have put its own socket there.
        match fs::symlink_metadata(&self.path) {
            Ok(found) if found.ino() == self.inode => fs::remove_file(&self.path),
            _ => Ok(()),
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = self.remove();
    }
}

/// accept4(2), with both flags in the one call.
fn accept(listener: &socket2::Socket) -> io::Result<(socket2::Socket, SockAddr)> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let accept = |storage: *mut SockAddrStorage, size: *mut libc::socklen_t| {
        // SAFETY: both pointers are `try_init`'s, to a storage and its size.
        let fd = unsafe { libc::accept4(listener.as_raw_fd(), storage.cast(), size, flags) };
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
    };
    // SAFETY: accept4(2) writes an address and its length, or fails.
    let (fd, address) = unsafe { SockAddr::try_init(accept) }?;
    // SAFETY: accept4(2) has just made this descriptor, and nobody else has it.
    Ok((unsafe { socket2::Socket::from_raw_fd(fd) }, address))
}

/// No packet arrives on an interface that does not exist (SO_BINDTOIFINDEX, for all users since Linux 5.7).
fn listen_nowhere(listener: &socket2::Socket) -> io::Result<()> {
    // SAFETY: the pointer is to what lives until the call returns, of the size that is said.
    let bound = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTOIFINDEX,
            (&raw const NOWHERE).cast(),
            size_of_val(&NOWHERE) as libc::socklen_t,
        )
    };
    if bound == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The connection died before it was accepted: accept(2) lists these as errors to be retried.
fn is_the_peers(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::EPROTO
                | libc::ENETDOWN
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
                | libc::ENONET
                | libc::EOPNOTSUPP
        )
    )
}

fn is_missing_family(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT))
}

fn explain(error: io::Error, address: SocketAddr) -> anyhow::Error {
    let what_to_do = match error.raw_os_error() {
        Some(libc::EADDRINUSE) => match port_owner::of(address) {
            Some(owner) => format!("{owner} has it; stop that process or choose another port"),
            None => "another process has it, unseen from here as those of other containers of the Pod are; \
                     have that container listen elsewhere, or this route (`listen`)"
                .to_owned(),
        },
        Some(libc::EACCES) => format!(
            "ports below 1024 need the sysctl net.ipv4.ip_unprivileged_port_start={port} (in a Pod: \
             securityContext.sysctls: [{{ name: net.ipv4.ip_unprivileged_port_start, value: \"{port}\" }}]), or \
             CAP_NET_BIND_SERVICE at the start",
            port = address.port()
        ),
        Some(libc::EADDRNOTAVAIL) => "this Pod does not have that address".to_owned(),
        _ => return anyhow::Error::new(error).context(format!("listen on {address}")),
    };
    anyhow::Error::msg(what_to_do).context(error).context(format!("listen on {address}"))
}

//! An address that a stream socket can listen on or connect to, written as routes write it.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::peer::{Listener, Peer};

/// TCP or a Unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// TCP.
    Tcp(SocketAddr),
    /// A Unix socket's path.
    Unix(PathBuf),
}

/// What kind of socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// TCP on IPv4.
    Tcp,
    /// TCP on IPv6.
    Tcp6,
    /// A Unix socket.
    Unix,
}

impl Address {
    /// Connects to this address, in the caller's namespace.
    pub fn connect(&self) -> Result<Peer> {
        let socket = self.socket()?;
        socket.connect(&self.sockaddr()?).with_context(|| format!("connect to {self}"))?;
        Peer::of(socket)
    }

    /// The same, as event loops do it: the socket never blocks, not while it connects either.
    pub fn connect_without_blocking(&self) -> Result<Peer> {
        let socket = self.socket()?;
        socket.set_nonblocking(true).context("make a socket non-blocking")?;
        match socket.connect(&self.sockaddr()?) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            other => other.with_context(|| format!("connect to {self}"))?,
        }
        Peer::of(socket)
    }

    /// Listens on this address, in the caller's namespace.
    pub fn listen(&self) -> Result<Listener> {
        let socket = self.socket()?;
        if let Self::Tcp(_) = self {
            socket.set_reuse_address(true).context("set SO_REUSEADDR")?;
        }
        socket.bind(&self.sockaddr()?).with_context(|| format!("bind {self}"))?;
        socket.listen(4096).with_context(|| format!("listen on {self}"))?;
        let bound = match self {
            Self::Tcp(_) => socket
                .local_addr()
                .context("ask for the address that was bound")?
                .as_socket()
                .context("read the address that was bound")?
                .into(),
            Self::Unix(_) => self.clone(),
        };
        Listener::of(socket, bound)
    }

    /// The IP address, and an error for a Unix socket.
    pub fn host(&self) -> Result<String> {
        self.tcp().map(|address| address.ip().to_string())
    }

    /// The port, and an error for a Unix socket.
    pub fn port(&self) -> Result<u16> {
        self.tcp().map(|address| address.port())
    }

    /// The TCP address, and an error for a Unix socket.
    pub fn tcp(&self) -> Result<SocketAddr> {
        match self {
            Self::Tcp(address) => Ok(*address),
            Self::Unix(path) => bail!("{} has no IP address", path.display()),
        }
    }

    fn socket(&self) -> Result<Socket> {
        let domain = match self {
            Self::Tcp(address) => Domain::for_address(*address),
            Self::Unix(_) => Domain::UNIX,
        };
        Socket::new(domain, Type::STREAM, None).context("open a socket")
    }

    fn sockaddr(&self) -> Result<SockAddr> {
        match self {
            Self::Tcp(address) => Ok((*address).into()),
            Self::Unix(path) => {
                SockAddr::unix(path).with_context(|| format!("make an address of {self}"))
            }
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

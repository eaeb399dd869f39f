//! The self-test of the `sockmap` tier: clients and an upstream of our own, and no relay in between, so
//! that what arrives has come through the kernel.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};

use super::{Check, STEP, accepted, listen};
use crate::config::InFlight;
use crate::datapath::cgroup::Visit;
use crate::datapath::programs::{Links, Programs};
use crate::datapath::sockmap::{Enrol, Sockmap};
use crate::proxy::shortcut::{Shortcut, Shortcuts};

/// Less than the default, so that it is used up in an instant.
const BUDGET: InFlight = InFlight {
    bytes: NonZeroU32::new(64 * 1024).expect("64 KiB are not 0"),
    messages: NonZeroU32::new(1024).expect("1024 are not 0"),
};
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const PIECE: usize = 8 * 1024;

type Attempt = fn(&Bench) -> Result<()>;

/// What was found out.
pub struct Found {
    pub checks: Vec<Check>,
    /// Whether an enrolled client is told how many bytes wait to be read, as any other is. Where it is
    /// not, some apps that are non-blocking notice too.
    pub counts_waiting_bytes: bool,
}

/// Tries the tier in a cgroup. An error if it could not be tried at all.
pub fn sockmap(cgroup: &Path) -> Result<Found> {
    let bench = Bench::new(cgroup)?;
    // Where the ambassador is a part of the Pod, it is in the Pod's cgroup already.
    let _visit = if bench.enrolled().is_ok() { None } else { Some(Visit::below(cgroup)?) };
    let tries: [(&str, Attempt); 5] = [
        ("a client's bytes go straight to the upstream", Bench::redirects),
        ("acknowledgements are followed", Bench::follows_acknowledgements),
        ("what exceeds the budget takes the native way", Bench::keeps_the_budget),
        ("a client's end is heard", Bench::hears_the_end),
        ("a blocking client is left alone", Bench::leaves_blocking_clients_alone),
    ];
    let checks = tries.into_iter().map(|(name, attempt)| Check::of(name, attempt(&bench)));
    let checks = checks.collect();
    Ok(Found { checks, counts_waiting_bytes: bench.counts_waiting_bytes().unwrap_or(false) })
}

/// Programs and maps of its own, a listener and an upstream.
struct Bench {
    sockmap: Sockmap,
    listener: TcpListener,
    upstream: TcpListener,
    _links: Links,
}

/// One connection without a relay.
struct Connection {
    client: TcpStream,
    accepted: TcpStream,
    ours: Socket,
    server: TcpStream,
    shortcut: Option<Arc<dyn Shortcut>>,
}

impl Bench {
    fn new(cgroup: &Path) -> Result<Self> {
        let mut programs = Programs::load(1)?;
        if let Some(why) = programs.no_sockmap() {
            anyhow::bail!("{why}");
        }
        let opened = File::open(cgroup).with_context(|| format!("open {}", cgroup.display()))?;
        let _links = programs.attach(&opened)?;
        let sockmap = Sockmap::new(&mut programs.maps(), BUDGET)?;
        let (listener, upstream) = (listen(LOCALHOST)?, listen(LOCALHOST)?);
        sockmap.enrol(listener.local_addr()?, Enrol::Unnoticed)?;
        Ok(Self { sockmap, listener, upstream, _links })
    }

    fn connect(&self, nonblocking: bool) -> Result<Connection> {
        let client = stream()?;
        client.set_nonblocking(nonblocking)?;
        match client.connect(&self.listener.local_addr()?.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            other => other.context("connect to the listener")?,
        }
        let accepted_socket = accepted(&self.listener).context("the client did not arrive")?;
        let ours = stream()?;
        self.sockmap.prepare(ours.as_fd());
        ours.connect(&self.upstream.local_addr()?.into()).context("connect to the upstream")?;
        let server = accepted(&self.upstream).context("the upstream was not reached")?;
        let shortcut = self.sockmap.open(accepted_socket.as_fd(), ours.as_fd());
        let client = TcpStream::from(client);
        Ok(Connection { client, accepted: accepted_socket, ours, server, shortcut })
    }

    fn enrolled(&self) -> Result<(Connection, Arc<dyn Shortcut>)> {
        let mut connection = self.connect(true)?;
        let shortcut = connection.shortcut.take().context("its socket was not enrolled")?;
        Ok((connection, shortcut))
    }

    fn redirects(&self) -> Result<()> {
        let (mut connection, shortcut) = self.enrolled()?;
        connection.client.write_all(b"straight")?;
        let mut heard = [0; 8];
        connection.server.read_exact(&mut heard).context("nothing arrived")?;
        ensure!(&heard == b"straight", "other bytes arrived");
        ensure!(shortcut.carried() == 8, "8 bytes were counted as {}", shortcut.carried());
        ensure!(shortcut.is_settled(connection.ours.as_fd()), "the account is not even");
        Ok(())
    }

    fn follows_acknowledgements(&self) -> Result<()> {
        let (mut connection, shortcut) = self.enrolled()?;
        let pieces = 4 * BUDGET.bytes.get() as usize / PIECE;
        let mut piece = [0; PIECE];
        for number in 0..pieces {
            connection.client.write_all(&piece)?;
            connection.server.read_exact(&mut piece).with_context(|| {
                format!("piece {number} did not arrive, {} bytes did", shortcut.carried())
            })?;
        }
        Ok(())
    }

    fn keeps_the_budget(&self) -> Result<()> {
        let (mut connection, shortcut) = self.enrolled()?;
        let most = 64 * 1024 * 1024;
        let mut sent = 0;
        while sent < most {
            match connection.client.write(&[0; PIECE]) {
                Ok(taken) => sent += taken,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        ensure!(sent < most, "nobody read, and {sent} bytes were taken");
        let acknowledged = waiting(&connection.server)?;
        let allowed = u64::from(BUDGET.bytes.get()) + acknowledged;
        let carried = shortcut.carried();
        ensure!(carried <= allowed, "{carried} bytes were carried, {allowed} may be");
        ensure!(waiting(&connection.accepted)? > 0, "nothing took the native way");
        Ok(())
    }

    fn hears_the_end(&self) -> Result<()> {
        let (mut connection, shortcut) = self.enrolled()?;
        connection.client.write_all(b"last")?;
        connection.client.shutdown(Shutdown::Write)?;
        let heard = connection.accepted.read(&mut [0; 1]).context("the end was not heard")?;
        ensure!(heard == 0 && shortcut.carried() == 4, "the end came without what was before it");
        ensure!(shortcut.is_settled(connection.ours.as_fd()), "the account is not even");
        Ok(())
    }

    fn leaves_blocking_clients_alone(&self) -> Result<()> {
        let connection = self.connect(false)?;
        ensure!(connection.shortcut.is_none(), "its socket was enrolled");
        Ok(())
    }

    fn counts_waiting_bytes(&self) -> Result<bool> {
        let (mut connection, _shortcut) = self.enrolled()?;
        connection.accepted.write_all(b"hello")?;
        connection.client.set_nonblocking(false)?;
        connection.client.set_read_timeout(Some(STEP))?;
        connection.client.peek(&mut [0; 1]).context("nothing arrived")?;
        Ok(waiting(&connection.client)? == 5)
    }
}

fn stream() -> Result<Socket> {
    Socket::new(Domain::IPV4, Type::STREAM, None).context("open a socket")
}

/// Bytes that wait to be read, as FIONREAD says.
fn waiting(stream: &TcpStream) -> Result<u64> {
    let mut waiting: libc::c_int = 0;
    // SAFETY: FIONREAD writes an int.
    let failed = unsafe { libc::ioctl(stream.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
    ensure!(failed == 0, "FIONREAD: {}", std::io::Error::last_os_error());
    Ok(u64::from(waiting.unsigned_abs()))
}

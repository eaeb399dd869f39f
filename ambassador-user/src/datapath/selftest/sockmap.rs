//! The self-test of the `sockmap` tier: clients and an upstream of our own, first with no relay in between,
//! so that what arrives has come through the kernel, and then with the relay.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};
use tokio::runtime::Runtime;

use super::{Check, Clock, listen};
use crate::config::InFlight;
use crate::datapath::programs::Maps;
use crate::datapath::sockmap::{Enrol, Sockmap};
use crate::proxy::shortcut::{Shortcut, Shortcuts};

/// Less than the default, so that it is used up in an instant.
pub(super) const BUDGET: InFlight = InFlight {
    bytes: NonZeroU32::new(64 * 1024).expect("64 KiB are not 0"),
    messages: NonZeroU32::new(1024).expect("1024 are not 0"),
};
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const PIECE: usize = 8 * 1024;

type Attempt = fn(&Bench) -> Result<()>;

/// A listener and an upstream, and what the relay runs in.
pub(super) struct Bench {
    sockmap: Sockmap,
    listener: TcpListener,
    upstream: TcpListener,
    pub(super) runtime: Runtime,
    pub(super) clock: Clock,
    /// How many to send where many are wanted.
    pub(super) bytes: u64,
}

/// One connection without a relay.
pub(super) struct Connection {
    pub(super) client: TcpStream,
    pub(super) accepted: TcpStream,
    pub(super) ours: Socket,
    pub(super) server: TcpStream,
}

impl Bench {
    pub(super) fn new(maps: &mut Maps, clock: Clock, bytes: u64) -> Result<Self> {
        let sockmap = Sockmap::new(maps, BUDGET)?;
        let (listener, upstream) = (listen(LOCALHOST)?, listen(LOCALHOST)?);
        sockmap.enrol(listener.local_addr()?, Enrol::Unnoticed)?;
        // Of this thread alone: the process may yet have to drop what threads would keep.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("start a runtime")?;
        Ok(Self { sockmap, listener, upstream, runtime, clock, bytes })
    }

    pub(super) fn try_all(&self) -> Vec<Check> {
        let tries: [(&str, Attempt); 12] = [
            ("a client's bytes go straight to the upstream", Self::redirects),
            ("acknowledgements are followed", Self::follows_acknowledgements),
            ("what exceeds the budget takes the native way", Self::keeps_the_budget),
            ("a client's end is heard", Self::hears_the_end),
            ("a blocking client is left alone", Self::leaves_blocking_clients_alone),
            ("the server may speak first", Self::server_may_speak_first),
            ("early bytes stay the first", Self::early_bytes_stay_the_first),
            ("each side may end its half", Self::each_side_may_end_its_half),
            ("each side may reset", Self::each_side_may_reset),
            ("a writer that had to stop is told to go on", Self::stopped_writer_goes_on),
            ("a slow reader's bytes stay within the budget", Self::slow_reader_holds_back),
            ("many bytes in pieces of any size arrive in order", Self::many_bytes_arrive),
        ];
        tries.into_iter().map(|(name, attempt)| self.clock.check(name, || attempt(self))).collect()
    }

    pub(super) fn connect(&self, nonblocking: bool) -> Result<Connection> {
        let client = self.stream()?;
        client.set_nonblocking(nonblocking)?;
        match client.connect(&self.listener.local_addr()?.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            other => other.context("connect to the listener")?,
        }
        let accepted = self.clock.accepted(&self.listener).context("the client did not arrive")?;
        let ours = self.stream()?;
        self.sockmap.prepare(ours.as_fd());
        ours.connect(&self.upstream.local_addr()?.into()).context("connect to the upstream")?;
        let server = self.clock.accepted(&self.upstream).context("the upstream was not reached")?;
        Ok(Connection { client: client.into(), accepted, ours, server })
    }

    fn stream(&self) -> Result<Socket> {
        let stream = Socket::new(Domain::IPV4, Type::STREAM, None).context("open a socket")?;
        // For connect(2) too, which else would try for minutes.
        stream.set_write_timeout(Some(self.clock.step()))?;
        Ok(stream)
    }

    pub(super) fn open(&self, connection: &Connection) -> Result<Arc<dyn Shortcut>> {
        let Connection { accepted, ours, .. } = connection;
        self.sockmap.open(accepted.as_fd(), ours.as_fd(), 0).context("its socket was not enrolled")
    }

    pub(super) fn enrolled(&self) -> Result<(Connection, Arc<dyn Shortcut>)> {
        let connection = self.connect(true)?;
        let shortcut = self.open(&connection)?;
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
        within_budget(&*shortcut, waiting(&connection.server)?)?;
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
        ensure!(self.open(&connection).is_err(), "its socket was enrolled");
        Ok(())
    }

    pub(super) fn counts_waiting_bytes(&self) -> Result<bool> {
        let (mut connection, _shortcut) = self.enrolled()?;
        connection.accepted.write_all(b"hello")?;
        connection.client.set_nonblocking(false)?;
        connection.client.set_read_timeout(Some(self.clock.step()))?;
        connection.client.peek(&mut [0; 1]).context("nothing arrived")?;
        Ok(waiting(&connection.client)? == 5)
    }
}

/// Expects no more to be under way than may be, when the server's socket has been given so many bytes.
pub(super) fn within_budget(shortcut: &dyn Shortcut, given: u64) -> Result<()> {
    let allowed = u64::from(BUDGET.bytes.get()) + given;
    let carried = shortcut.carried();
    ensure!(carried <= allowed, "{carried} bytes were carried, {allowed} may be");
    Ok(())
}

/// Bytes that wait to be read, as FIONREAD says.
pub(super) fn waiting(stream: &impl AsRawFd) -> Result<u64> {
    let mut waiting: libc::c_int = 0;
    // SAFETY: FIONREAD writes an int.
    let failed = unsafe { libc::ioctl(stream.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
    ensure!(failed == 0, "FIONREAD: {}", std::io::Error::last_os_error());
    Ok(u64::from(waiting.unsigned_abs()))
}

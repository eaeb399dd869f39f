//! The self-test of the `sockmap` tier: clients and an upstream of our own, first with no relay in between,
//! so that what arrives has come through the kernel, and then with the relay.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Socket, Type};
use tokio::runtime::Runtime;

use super::{Check, Clock, listen};
use crate::config::InFlight;
use crate::datapath::programs::Maps;
use crate::datapath::sockmap::{Enrol, Sockmap, is_diverted};
use crate::proxy::shortcut::{Candidate, Shortcut, Shortcuts};

/// Less than the default, so that it is used up in an instant.
pub(super) const BUDGET: InFlight = InFlight {
    bytes: NonZeroU32::new(64 * 1024).expect("64 KiB are not 0"),
    messages: NonZeroU32::new(1024).expect("1024 are not 0"),
};
pub(super) const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
pub(super) const PIECE: usize = 8 * 1024;

type Attempt = fn(&Bench) -> Result<()>;

/// A listener and an upstream, and what the relay runs in.
pub(super) struct Bench {
    pub(super) sockmap: Sockmap,
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
    candidate: Option<Arc<dyn Candidate>>,
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
        let tries: [(&str, Attempt); 16] = [
            ("a client's bytes go straight to the upstream", Self::redirects),
            ("acknowledgements are followed", Self::follows_acknowledgements),
            ("what exceeds the budget takes the native way", Self::keeps_the_budget),
            ("a client's end is heard", Self::hears_the_end),
            ("a blocking client is left alone", Self::leaves_blocking_clients_alone),
            ("a client that turns blocking is given back", Self::gives_back_who_turns_blocking),
            ("a zero-copy client is left alone", Self::leaves_zero_copy_clients_alone),
            (
                "a client that turns to zero-copy is given back",
                Self::gives_back_who_turns_to_zero_copy,
            ),
            ("a client that polls is told what there is", Self::tells_who_polls),
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
        self.connect_from(client, &self.listener)
    }

    pub(super) fn connect_from(
        &self,
        client: Socket,
        listener: &TcpListener,
    ) -> Result<Connection> {
        match client.connect(&listener.local_addr()?.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            other => other.context("connect to the listener")?,
        }
        let accepted = self.clock.accepted(listener).context("the client did not arrive")?;
        let (candidate, ours) = (self.sockmap.candidate(accepted.as_fd()), self.stream()?);
        candidate.iter().for_each(|it| it.prepare(ours.as_fd()));
        ours.connect(&self.upstream.local_addr()?.into()).context("connect to the upstream")?;
        let server = self.clock.accepted(&self.upstream).context("the upstream was not reached")?;
        Ok(Connection { client: client.into(), accepted, candidate, ours, server })
    }

    pub(super) fn stream(&self) -> Result<Socket> {
        let stream = Socket::new(Domain::IPV4, Type::STREAM, None).context("open a socket")?;
        // For connect(2) too, which else would try for minutes.
        stream.set_write_timeout(Some(self.clock.step()))?;
        Ok(stream)
    }

    pub(super) fn open(&self, connection: &Connection) -> Result<Arc<dyn Shortcut>> {
        let Connection { accepted, candidate, ours, .. } = connection;
        let opened = candidate.as_ref().and_then(|it| it.open(accepted.as_fd(), ours.as_fd(), 0));
        opened.context("its socket was not enrolled")
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
        self.is_left_alone(&self.connect(false)?)
    }

    fn leaves_zero_copy_clients_alone(&self) -> Result<()> {
        let client = self.stream()?;
        client.set_nonblocking(true)?;
        want_completions(&client)?;
        self.is_left_alone(&self.connect_from(client, &self.listener)?)
    }

    /// When the tier is closed, or gone.
    pub(super) fn enrols_nobody(&self) -> Result<()> {
        self.is_left_alone(&self.connect(true)?)
    }

    fn is_left_alone(&self, connection: &Connection) -> Result<()> {
        ensure!(self.open(connection).is_err(), "its socket was enrolled");
        ensure!(!is_diverted(connection.client.as_fd()), "its socket is not an ordinary one");
        Ok(())
    }

    fn gives_back_who_turns_blocking(&self) -> Result<()> {
        self.gives_back_who(|client| Ok(client.set_nonblocking(false)?))
    }

    fn gives_back_who_turns_to_zero_copy(&self) -> Result<()> {
        self.gives_back_who(want_completions)
    }

    /// With the next piece of a client whose app would notice from now on.
    fn gives_back_who(&self, turns: impl FnOnce(&TcpStream) -> Result<()>) -> Result<()> {
        let (mut connection, shortcut) = self.enrolled()?;
        ensure!(is_diverted(connection.client.as_fd()), "its socket was not enrolled");
        turns(&connection.client)?;
        connection.client.write_all(b"natively")?;
        let heard = connection.accepted.read_exact(&mut [0; 8]);
        heard.context("its bytes did not take the native way")?;
        ensure!(shortcut.is_settled(connection.ours.as_fd()), "the account is not even");
        ensure!(!is_diverted(connection.client.as_fd()), "its socket is still enrolled");
        Ok(())
    }

    fn tells_who_polls(&self) -> Result<()> {
        let (mut connection, _shortcut) = self.enrolled()?;
        let Connection { client, accepted, .. } = &mut connection;
        let has_nothing_to_read = |client: &mut TcpStream| {
            let told = polled(client)?;
            ensure!(told == PollFlags::OUT, "where nothing is to be read it is told {told:?}");
            let read = client.read(&mut [0]);
            let at_once = read.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
            ensure!(at_once, "where nothing is to be read it is {read:?}");
            Ok(())
        };
        has_nothing_to_read(client)?;
        accepted.write_all(b"hello")?;
        self.clock.wait("it is not told that it can read", || {
            Ok(polled(client)?.contains(PollFlags::IN).then_some(()))
        })?;
        client.read_exact(&mut [0; 5])?;
        has_nothing_to_read(client)
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

/// What poll(2) says of a socket, at once.
pub(super) fn polled(stream: &TcpStream) -> Result<PollFlags> {
    let mut asked = [PollFd::new(stream, PollFlags::IN | PollFlags::OUT)];
    poll(&mut asked, Some(&Timespec::default())).context("poll")?;
    Ok(asked[0].revents())
}

/// Sets SO_ZEROCOPY.
pub(super) fn want_completions(stream: &impl AsRawFd) -> Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the pointer and the length describe `on`, which the kernel only reads.
    let failed = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ZEROCOPY,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    ensure!(failed == 0, "SO_ZEROCOPY: {}", std::io::Error::last_os_error());
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

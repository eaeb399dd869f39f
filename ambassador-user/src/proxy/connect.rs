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
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::shortcut::Candidate;
use super::socket::{Family, Socket, tune_tcp};
use crate::upstream::balance::Source;
use crate::upstream::circuit::{Circuit, Full, Place};
use crate::upstream::host::{At, Host};
use crate::upstream::{Lease, Upstream};

/// How long an address may be silent before the next one is tried beside it (RFC 8305).
const FALLBACK: Duration = Duration::from_millis(250);
/// Between two rounds of tries for a connection that is held.
const AGAIN: Duration = Duration::from_millis(250);
/// A full Unix backlog gives no event to wait for.
const UNIX_BACKLOG: Duration = Duration::from_millis(5);

/// An established connection to an upstream.
pub struct Connected {
    pub socket: Socket,
    pub lease: Lease,
    pub host: Arc<Host>,
    /// Where the route limits what a host gets.
    pub place: Option<Place>,
}

/// Who connects.
#[derive(Debug, Clone)]
pub enum As {
    /// An ambassador: the connect hooks leave its sockets alone, and they are shown to those that may have a shortcut.
    Ambassador(Option<Arc<dyn Candidate>>),
    /// The same, for a question or two: nobody carries anything on such a connection.
    Check,
    /// An app like any other.
    App,
}

/// One connection that wants to reach an upstream.
struct Attempts<'a> {
    upstream: &'a Upstream,
    who: &'a As,
    source: &'a Source,
    circuit: Option<&'a Circuit>,
}

/// Tries until the upstream is reached, or `hold` is over. The error is [`Full`] if nobody could be asked.
pub async fn connect(
    upstream: &Upstream,
    who: &As,
    source: &Source,
    circuit: Option<&Circuit>,
) -> Result<Connected> {
    let attempts = Attempts { upstream, who, source, circuit };
    if !upstream.holds() {
        return attempts.go_round().await;
    }
    let give_up = Instant::now() + upstream.connect.hold;
    loop {
        let failure = match attempts.go_round().await {
            Ok(connected) => return Ok(connected),
            Err(failure) => failure,
        };
        // From here on, because what it was told itself is no news.
        let mut changes = upstream.changes();
        // What is full is refused at once.
        if Instant::now() >= give_up || failure.is::<Full>() {
            return Err(failure);
        }
        tokio::select! {
            Ok(()) = changes.changed() => {}
            () = sleep_until(give_up.min(Instant::now() + AGAIN)) => {}
        }
    }
}

impl Attempts<'_> {
    /// Tries endpoints as the upstream's policy orders them: each at most once, at most `attempts` of
    /// them, each within `timeout`.
    async fn go_round(&self) -> Result<Connected> {
        let upstream = self.upstream;
        let mut tried = Vec::new();
        let mut failures = Vec::new();
        let mut left = upstream.connect.attempts.get();
        while left > 0 {
            let Some((index, lease)) = upstream.choose(&tried, self.source, self.circuit) else {
                break;
            };
            let deadline = Instant::now() + upstream.connect.timeout;
            let mut asked = Vec::new();
            let reached = timeout_at(deadline, self.reach(&lease, &tried, &mut asked)).await;
            match reached.unwrap_or_else(|_elapsed| {
                let silence = upstream.connect.timeout;
                let why = format!("no answer within {}", humantime::format_duration(silence));
                // Whom it was asked last had no time to answer.
                let half = deadline - silence / 2;
                let silent = asked.iter().filter(|(_, since)| *since <= half);
                silent.for_each(|(host, _)| upstream.unreached(host, &why));
                Err(anyhow!(why))
            }) {
                Ok((socket, host, mut place)) => {
                    upstream.reached(&host);
                    place.iter_mut().for_each(Place::arrive);
                    return Ok(Connected { socket, lease, host, place });
                }
                Err(error) => {
                    failures.push(format!("{}: {error:#}", lease.endpoint().label()));
                    tried.push(index);
                    // A name that leads nowhere yet takes no attempt from those who are there.
                    if !asked.is_empty() || !upstream.knows_another(&tried) {
                        left -= 1;
                    }
                }
            }
        }
        if failures.is_empty() {
            let hosts = upstream.hosts();
            if hosts.iter().any(|host| host.is_good()) {
                return Err(Full.into());
            }
            failures.extend(hosts.iter().map(|host| format!("{}: {}", host.at, host.health())));
        }
        Err(anyhow!("{}", failures.join("; ")))
    }

    /// Connects to a host of the endpoint; `asked` tells those that have not answered yet.
    async fn reach(
        &self,
        lease: &Lease,
        tried: &[usize],
        asked: &mut Vec<Asked>,
    ) -> Result<Reached> {
        let mut hosts = self.upstream.reach(lease.endpoint(), tried, self.source).await?;
        if let [host] = &hosts[..] {
            let place = self.place(host)?;
            asked.push((Arc::clone(host), Instant::now()));
            let socket = to(host, self.who).await.inspect_err(|error| self.blame(host, error));
            let socket = socket.with_context(|| format!("connect to {}", host.at))?;
            return Ok((socket, Arc::clone(host), place));
        }
        if let Some(circuit) = self.circuit {
            hosts.retain(|host| !circuit.is_full(host));
        }
        self.fastest(hosts, asked).await
    }

    /// Tries the hosts in order, the next one beside the last when that fails or stays silent.
    async fn fastest(&self, hosts: Vec<Arc<Host>>, asked: &mut Vec<Asked>) -> Result<Reached> {
        let mut waiting = hosts.into_iter();
        let mut racing = JoinSet::new();
        let mut failure = anyhow!("no address");
        loop {
            if let Some(host) = waiting.next() {
                let Ok(place) = self.place(&host) else { continue };
                asked.push((Arc::clone(&host), Instant::now()));
                let who = self.who.clone();
                racing.spawn(async move { (to(&host, &who).await, host, place) });
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
                Some(Ok((Ok(socket), host, place))) => return Ok((socket, host, place)),
                Some(Ok((Err(error), host, _))) => {
                    asked.retain(|(it, _)| !Arc::ptr_eq(it, &host));
                    self.blame(&host, &error);
                    failure = anyhow!(error).context(format!("connect to {}", host.at));
                }
                Some(Err(error)) => failure = error.into(),
                None => return Err(failure),
            }
        }
    }

    /// A place at a host, if the route limits what that gets.
    fn place(&self, host: &Host) -> Result<Option<Place>, Full> {
        self.circuit.map(|circuit| circuit.begin(host).ok_or(Full)).transpose()
    }

    /// Tells the upstream of a failure, unless it is our own.
    fn blame(&self, host: &Arc<Host>, error: &io::Error) {
        let theirs = [
            libc::ECONNREFUSED,
            libc::ECONNRESET,
            libc::ETIMEDOUT,
            libc::EHOSTUNREACH,
            libc::EHOSTDOWN,
            libc::ENETUNREACH,
            libc::ENOENT,
        ];
        if error.raw_os_error().is_some_and(|code| theirs.contains(&code)) {
            self.upstream.unreached(host, &error.to_string());
        }
    }
}

/// A host, and since when.
type Asked = (Arc<Host>, Instant);

/// A host, and the way there.
type Reached = (Socket, Arc<Host>, Option<Place>);

/// Connects to one host.
pub async fn to(host: &Host, who: &As) -> io::Result<Socket> {
    match &host.at {
        At::Tcp(address) => tcp(*address, who).await,
        At::Unix(path) => unix(path).await,
    }
}

async fn tcp(address: SocketAddr, who: &As) -> io::Result<Socket> {
    let socket = stream(Domain::for_address(address))?;
    if !matches!(who, As::Check) {
        tune_tcp(&socket)?;
    }
    if let As::Ambassador(Some(candidate)) = who {
        candidate.prepare(socket.as_fd());
    }
    if !matches!(who, As::App) && address.ip().is_loopback() {
        mark_as_ours(&socket, address.ip())?;
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

//! The built-in upstream: a server that echoes, swallows or pours out, as the client asks.
//!
//! A connection's first byte says what it is for. [`ECHO`]: everything comes back, that byte
//! included. [`UPLOAD`] and a length: one byte says "go", that many bytes of the
//! [pattern](super::pattern) follow, and the answer is how many were right. [`DOWNLOAD`] and a
//! length: that many bytes of the pattern come. [`PEER`]: the port it came from comes, two bytes. Numbers
//! are little-endian, lengths of eight bytes; no end of a stream carries a meaning, because not every proxy
//! passes a half-close on.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use socket2::{Domain, SockRef, Socket, Type};

use super::pattern::{self, CHUNK};

/// First byte of a connection on which everything comes back.
pub const ECHO: u8 = b'E';
/// First byte of a connection that brings bytes.
pub const UPLOAD: u8 = b'U';
/// First byte of a connection that fetches bytes.
pub const DOWNLOAD: u8 = b'D';
/// First byte of a connection that asks which it is: where nobody is in between, its client knows.
pub const PEER: u8 = b'P';

/// Enough for connections that arrive in a burst.
const BACKLOG: i32 = 4096;
/// A worker's frames are small; its buffer for bulk is on the heap.
const STACK: usize = 64 * 1024;

/// A running upstream; ends when dropped, after the connections on it have ended.
pub struct Upstream {
    address: SocketAddr,
    staff: Arc<Staff>,
}

impl Upstream {
    /// Listens on a free port of `ip`. The server runs where the calling thread runs: its network
    /// namespace, its CPUs.
    pub fn start(ip: IpAddr) -> Result<Self> {
        let listener = listen(ip).context("listen for the built-in upstream")?;
        let address = listener.local_addr().context("read the address of the built-in upstream")?;
        let staff =
            Arc::new(Staff { listener, idle: AtomicUsize::new(0), workers: Mutex::default() });
        Staff::hire(&staff).context("start the built-in upstream")?;
        Ok(Self { address, staff })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        // Wakes every worker that waits for a connection, with an error that ends it.
        let _ = SockRef::from(&self.staff.listener).shutdown(Shutdown::Both);
        while let Some(worker) = self.staff.pop() {
            let _ = worker.join();
        }
    }
}

/// Blocking workers on one listener: as many as there have been connections at once, plus one.
///
/// Nothing is as quick to answer as a thread that waits for just this, and a thread that is used
/// again costs a short connection nothing.
struct Staff {
    listener: TcpListener,
    idle: AtomicUsize,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

impl Staff {
    fn hire(staff: &Arc<Self>) -> io::Result<()> {
        let own = Arc::clone(staff);
        let worker = thread::Builder::new().stack_size(STACK).spawn(move || Self::work(&own))?;
        staff.workers.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
        Ok(())
    }

    fn work(staff: &Arc<Self>) {
        staff.idle.fetch_add(1, Ordering::AcqRel);
        while let Ok((client, _)) = staff.listener.accept() {
            // Somebody must be there for the next one. Without another thread it has to wait, and
            // the client's deadline tells.
            if staff.idle.fetch_sub(1, Ordering::AcqRel) == 1 {
                let _ = Self::hire(staff);
            }
            // How a connection ends is the client's business, which sees it too.
            let _ = serve(client);
            staff.idle.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn pop(&self) -> Option<JoinHandle<()>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

fn listen(ip: IpAddr) -> io::Result<TcpListener> {
    let address = SocketAddr::new(ip, 0);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    // Accepted sockets inherit it.
    socket.set_tcp_nodelay(true)?;
    Ok(socket.into())
}

fn serve(mut client: TcpStream) -> io::Result<()> {
    let mut first = [0; 4096];
    let got = client.read(&mut first)?;
    match first[..got] {
        [] => Ok(()),
        [ECHO, ..] => {
            client.write_all(&first[..got])?;
            echo(client, &mut first)
        }
        [UPLOAD, ref length @ ..] => {
            let length = read_length(&mut client, length)?;
            client.write_all(b"g")?;
            let right = swallow(&mut client, length)?;
            client.write_all(&right.to_le_bytes())
        }
        [DOWNLOAD, ref length @ ..] => {
            let length = read_length(&mut client, length)?;
            pour(&mut client, length)
        }
        [PEER, ..] => client.write_all(&client.peer_addr()?.port().to_le_bytes()),
        [other, ..] => Err(io::Error::new(io::ErrorKind::InvalidData, format!("byte {other}"))),
    }
}

/// The rest of the request, of which `start` has come already. Nothing follows it.
fn read_length(client: &mut TcpStream, start: &[u8]) -> io::Result<u64> {
    let mut length = [0; 8];
    let (known, missing) = length
        .split_at_mut_checked(start.len())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "bytes after the length"))?;
    known.copy_from_slice(start);
    client.read_exact(missing)?;
    Ok(u64::from_le_bytes(length))
}

fn echo(mut client: TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    loop {
        match client.read(buffer)? {
            0 => return Ok(()),
            got => client.write_all(&buffer[..got])?,
        }
    }
}

/// Writes `length` bytes of the pattern.
pub fn pour(to: &mut impl Write, length: u64) -> io::Result<()> {
    let mut sent = 0;
    while sent < length {
        let next = (length - sent).min(CHUNK as u64) as usize;
        to.write_all(pattern::at(sent, next))?;
        sent += next as u64;
    }
    Ok(())
}

/// Reads `length` bytes and tells how many were right until the first that was wrong. They are all
/// read, so that a wrong byte does not look like a stall to the sender.
pub fn swallow(from: &mut impl Read, length: u64) -> io::Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let mut received = 0;
    let mut wrong = None;
    while received < length {
        let most = (length - received).min(CHUNK as u64) as usize;
        let got = from.read(&mut buffer[..most])?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if wrong.is_none() {
            wrong = pattern::first_wrong(received, &buffer[..got]);
        }
        received += got as u64;
    }
    Ok(wrong.unwrap_or(length))
}

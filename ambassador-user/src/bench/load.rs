//! The loads: what a client does to a way through, with every byte checked.
//!
//! A load is done or fails: a reply that is lost or wrong, or no progress for [`STALL`], is never just a
//! slow result.

pub mod connections;
pub mod round_trips;
pub mod transfer;

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use super::latency::Latency;

/// Without a byte for so long, a connection counts as stalled.
pub const STALL: Duration = Duration::from_secs(5);

/// Where a load is sent, and where its cost is read.
pub trait Target {
    /// Of whatever counts the cost, at one time.
    type Reading;

    /// What the client connects to: each leads to the upstream.
    fn addresses(&self) -> &[SocketAddr];

    /// Reads what counts the cost: as what is timed begins, and as it ends.
    fn read(&self) -> Result<Self::Reading>;

    /// Where the connection with this number goes.
    fn address(&self, number: usize) -> SocketAddr {
        let addresses = self.addresses();
        addresses[number % addresses.len()]
    }
}

/// Requests that were all answered.
pub struct Served<R> {
    /// How many there were.
    pub count: u64,
    /// How many in a second.
    pub per_second: f64,
    /// How long they took.
    pub latency: Latency,
    /// What was read before and after.
    pub spent: (R, R),
}

/// Connects a client. Its reads and writes fail when nothing moves for [`STALL`].
pub fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, STALL)
        .with_context(|| format!("connect to {address}"))?;
    stream.set_nodelay(true).context("set up a connection")?;
    stream.set_read_timeout(Some(STALL)).context("set up a connection")?;
    stream.set_write_timeout(Some(STALL)).context("set up a connection")?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, Shutdown, TcpListener};
    use std::thread;

    use super::transfer::Direction;
    use super::*;
    use crate::bench::upstream::Upstream;

    const BYTES: u64 = 1 << 20;

    /// Of which nothing is read.
    struct Addresses(Vec<SocketAddr>);

    impl Target for Addresses {
        type Reading = ();

        fn addresses(&self) -> &[SocketAddr] {
            &self.0
        }

        fn read(&self) -> Result<()> {
            Ok(())
        }
    }

    fn upstream() -> Upstream {
        Upstream::start(Ipv4Addr::LOCALHOST.into()).expect("start an upstream")
    }

    /// A proxy for one connection, which changes the byte at this place each way.
    fn tampering(upstream: SocketAddr, place: usize) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("listen");
        let address = listener.local_addr().expect("read the address");
        thread::spawn(move || {
            let (client, _) = listener.accept().expect("accept");
            let server = TcpStream::connect(upstream).expect("connect");
            let back = (server.try_clone().expect("clone"), client.try_clone().expect("clone"));
            let way = move |(mut from, mut to): (TcpStream, TcpStream)| {
                let mut buffer = [0; 4096];
                let mut moved = 0;
                while let Ok(got @ 1..) = from.read(&mut buffer) {
                    if let Some(byte) =
                        place.checked_sub(moved).and_then(|at| buffer[..got].get_mut(at))
                    {
                        *byte = byte.wrapping_add(1);
                    }
                    moved += got;
                    if to.write_all(&buffer[..got]).is_err() {
                        break;
                    }
                }
                let _ = to.shutdown(Shutdown::Both);
            };
            thread::spawn(move || way(back));
            way((client, server));
        });
        address
    }

    fn target(address: SocketAddr) -> Addresses {
        Addresses(vec![address])
    }

    #[test]
    fn a_changed_byte_fails_a_transfer_and_is_named() {
        let upstream = upstream();
        // Past the request, which goes the same way as the upload.
        let up = target(tampering(upstream.address(), 9 + 70_000));
        let down = target(tampering(upstream.address(), 70_000));
        let error = |target, direction| {
            transfer::run(target, direction, BYTES, 1).err().expect("wrong").to_string()
        };
        assert_eq!(error(&up, Direction::Up), "byte 70000 of the upload arrived wrong");
        assert_eq!(error(&down, Direction::Down), "byte 70000 of the download arrived wrong");
    }

    #[test]
    fn a_changed_byte_fails_a_round_trip() {
        let upstream = upstream();
        let target = target(tampering(upstream.address(), 6400));
        let done = round_trips::run(&target, 1, 4096, Duration::from_secs(5));
        assert_eq!(done.err().expect("wrong").to_string(), "a reply has wrong bytes");
    }

    #[test]
    fn one_silent_connection_of_many_fails_the_load() {
        let upstream = upstream();
        let mut target = target(upstream.address());
        // It answers the greeting, and nothing after that.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("listen");
        target.0.push(listener.local_addr().expect("read the address"));
        let silent = thread::spawn(move || {
            let (mut client, _) = listener.accept().expect("accept");
            let mut greeting = [0; 64];
            client.read_exact(&mut greeting).expect("read the greeting");
            client.write_all(&greeting).expect("answer the greeting");
            // Until the client gives up.
            while client.read(&mut greeting).is_ok_and(|got| got > 0) {}
        });
        let done = round_trips::run(&target, 2, 64, Duration::from_millis(10));
        let error = done.err().expect("silence").to_string();
        assert_eq!(error, "no reply on 1 of 2 connections in 5s");
        silent.join().expect("the silent server ends");
    }
}

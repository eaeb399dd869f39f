//! Ends TCP connections of other processes, as `ss --kill` does: for apps whose connection leads to a host
//! that is lost.
//!
//! That takes CAP_NET_ADMIN, which this process gives up. One thread keeps it, and does nothing else.
#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use caps::Capability;
use socket2::{Domain, Protocol, Socket, Type};
use tracing::{debug, info, warn};

use super::{ERROR, HEADER, cut_message, number};
use crate::privileges;

/// `SOCK_DESTROY` of linux/sock_diag.h.
const SOCK_DESTROY: u16 = 21;
/// struct inet_diag_req_v2; in it, struct inet_diag_sockid and what lies in that.
const REQUEST: usize = 56;
const ID: usize = 8;
const SOURCE: usize = ID + 4;
const DESTINATION: usize = ID + 20;
const COOKIE: usize = ID + 40;

/// How many orders may wait; one more is given up, and told.
const ORDERS: usize = 64;

/// A connection, from its app's end.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    pub cookie: u64,
    pub local: SocketAddr,
    pub remote: SocketAddr,
}

/// The thread that ends connections.
#[derive(Debug)]
pub struct Destroyer(SyncSender<Vec<Connection>>);

impl Destroyer {
    /// Starts it, while this process may still do what it does.
    pub fn start() -> Result<Self> {
        let kind = Protocol::from(libc::NETLINK_SOCK_DIAG);
        let kernel = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(kind))
            .context("open a socket of sock_diag")?;
        kernel.set_read_timeout(Some(Duration::from_secs(1)))?;
        // Refused where this process may not, or the kernel cannot; else there is no such connection.
        let nobody = SocketAddr::from(([127, 0, 0, 1], 0));
        let trial = Connection { cookie: 0, local: nobody, remote: nobody };
        match destroy(&kernel, &trial) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            answer => answer
                .context("try to end a connection (CAP_NET_ADMIN, CONFIG_INET_DIAG_DESTROY)")?,
        }
        let (orders, given) = sync_channel(ORDERS);
        let (ready, is_ready) = sync_channel(1);
        thread::Builder::new()
            .name("destroyer".to_owned())
            .spawn(move || {
                let narrowed = privileges::keep_only(Capability::CAP_NET_ADMIN);
                let works = narrowed.is_ok();
                let _ = ready.send(narrowed);
                if works {
                    serve(&kernel, &given);
                }
            })
            .context("start a thread")?;
        is_ready.recv().context("hear of the thread")?.context("give up all but CAP_NET_ADMIN")?;
        info!("one thread keeps CAP_NET_ADMIN, to end connections to hosts that are lost");
        Ok(Self(orders))
    }

    /// Has connections ended, soon.
    pub fn end(&self, connections: Vec<Connection>) {
        if self.0.try_send(connections).is_err() {
            warn!("connections to a lost host stay open: there are too many to end");
        }
    }
}

fn serve(kernel: &Socket, given: &Receiver<Vec<Connection>>) {
    while let Ok(connections) = given.recv() {
        for connection in connections {
            if let Err(error) = destroy(kernel, &connection) {
                // It has ended by itself, as a rule.
                debug!(?connection, "not ended: {error}");
            }
        }
    }
}

fn destroy(mut kernel: &Socket, connection: &Connection) -> io::Result<()> {
    kernel.send(&request(connection))?;
    let mut answer = [0; 1024];
    let length = kernel.read(&mut answer)?;
    let (kind, body) = cut_message(&mut &answer[..length]).ok_or(io::ErrorKind::InvalidData)?;
    match number(body, 0).map(i32::from_ne_bytes) {
        Some(0) if kind == ERROR => Ok(()),
        Some(code) if kind == ERROR => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// struct nlmsghdr and struct inet_diag_req_v2. IPv4 goes by its mapped form, which finds sockets of both
/// families (net/ipv4/inet_diag.c: `inet_diag_find_one_icsk`).
fn request(connection: &Connection) -> [u8; HEADER + REQUEST] {
    let mut message = [0; HEADER + REQUEST];
    let length = message.len() as u32;
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    message[..4].copy_from_slice(&length.to_ne_bytes());
    message[4..6].copy_from_slice(&SOCK_DESTROY.to_ne_bytes());
    message[6..8].copy_from_slice(&flags.to_ne_bytes());
    let request = &mut message[HEADER..];
    request[0] = libc::AF_INET6 as u8;
    request[1] = libc::IPPROTO_TCP as u8;
    request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    request[ID..ID + 2].copy_from_slice(&connection.local.port().to_be_bytes());
    request[ID + 2..ID + 4].copy_from_slice(&connection.remote.port().to_be_bytes());
    request[SOURCE..SOURCE + 16].copy_from_slice(&mapped(connection.local.ip()));
    request[DESTINATION..DESTINATION + 16].copy_from_slice(&mapped(connection.remote.ip()));
    request[COOKIE..COOKIE + 4].copy_from_slice(&(connection.cookie as u32).to_ne_bytes());
    request[COOKIE + 4..].copy_from_slice(&((connection.cookie >> 32) as u32).to_ne_bytes());
    message
}

fn mapped(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

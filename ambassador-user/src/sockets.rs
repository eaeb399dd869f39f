//! Live figures of TCP connections that this process does not hold: the kernel's answer to sock_diag(7).
//!
//! It works as any user, for the connections of this thread's network namespace. A crate of netlink
//! messages would make vectors of every socket; what is needed of them is six numbers, read in place.
#![forbid(unsafe_code)]

pub mod destroy;

use std::io::{self, ErrorKind, Read};
use std::mem::offset_of;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

/// How long all of the answer may take.
const LONGEST: Duration = Duration::from_secs(1);

/// The kernel writes at most so much of its answer at once (net/netlink/af_netlink.c), and goes on
/// when that is read: what is under way is bounded, however many sockets there are.
const PART: usize = 32 << 10;

/// `SOCK_DIAG_BY_FAMILY` of linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// How an answer ends: an errno follows, negated, or 0.
const DONE: u16 = libc::NLMSG_DONE as u16;
const ERROR: u16 = libc::NLMSG_ERROR as u16;

/// `INET_DIAG_INFO` of linux/inet_diag.h: struct tcp_info.
const INET_DIAG_INFO: u16 = 2;

/// Sizes of struct nlmsghdr, struct inet_diag_msg and struct nlattr; the cookie's place in the second.
const HEADER: usize = 16;
const SOCKET: usize = 72;
const ATTRIBUTE: usize = 4;
const COOKIE: usize = 44;

/// The states whose sockets are connections with figures, as bits of net/tcp_states.h: established,
/// SYN sent, both FIN waits, close wait, last ACK, closing.
const STATES: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

/// What the kernel says of one end of a connection. A figure that it does not know is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// The socket's name for its whole life, as by SO_COOKIE and `bpf_get_socket_cookie`.
    pub cookie: u64,
    /// As in net/tcp_states.h: 1 is established.
    pub state: u8,
    /// Sent and acknowledged. The SYN of the end that connected counts as a byte, and so does its FIN.
    pub bytes_acked: u64,
    /// Received in order. The peer's FIN counts as a byte.
    pub bytes_received: u64,
    /// The smoothed round-trip time, in microseconds.
    pub rtt_us: u32,
    /// Segments sent again.
    pub total_retrans: u32,
}

/// States of include/net/tcp_states.h.
const FIN_WAIT2: u8 = 5;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

impl Figures {
    /// Bytes of the stream each way, sent and received, of the end that opened the connection. (The
    /// kernel counts sequence numbers, of which SYN and FIN take one each.)
    pub fn opener_bytes(&self) -> (u64, u64) {
        let said = if self.state == FIN_WAIT2 { 2 } else { 1 };
        let heard = matches!(self.state, CLOSE_WAIT | LAST_ACK | CLOSING);
        (self.bytes_acked.saturating_sub(said), self.bytes_received.saturating_sub(heard.into()))
    }
}

/// Calls `found` for every TCP connection of this network namespace, both ends where both are here.
///
/// It takes time by the number of sockets, at most a second: not for a thread of the runtime. Sockets
/// that come and go meanwhile may be missed or seen twice.
pub fn each_connection(mut found: impl FnMut(Figures)) -> Result<()> {
    let deadline = Instant::now() + LONGEST;
    let kind = Protocol::from(libc::NETLINK_SOCK_DIAG);
    let kernel = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(kind))
        .context("open a socket to ask for the figures of connections")?;
    let mut part = vec![0; PART];
    for (family, name) in [(libc::AF_INET, "IPv4"), (libc::AF_INET6, "IPv6")] {
        match dump(&kernel, family, deadline, &mut part, &mut found) {
            // A kernel built without IPv6 has no such connections.
            Err(error) if family == libc::AF_INET6 && error.kind() == ErrorKind::NotFound => {}
            answer => answer.with_context(|| {
                format!("ask the kernel (inet_diag) for the figures of {name} connections")
            })?,
        }
    }
    Ok(())
}

fn dump(
    mut kernel: &Socket,
    family: libc::c_int,
    deadline: Instant,
    part: &mut [u8],
    found: &mut impl FnMut(Figures),
) -> io::Result<()> {
    kernel.send(&request(family))?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        // Less than a microsecond would be none, which is for ever.
        kernel.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let length = match kernel.read(part) {
            // A signal, or the time is up.
            Err(error)
                if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) =>
            {
                continue;
            }
            length => length?,
        };
        let mut messages = &part[..length];
        while !messages.is_empty() {
            let (kind, body) = cut_message(&mut messages).ok_or(ErrorKind::InvalidData)?;
            match kind {
                SOCK_DIAG_BY_FAMILY => figures(body).into_iter().for_each(&mut *found),
                DONE | ERROR => {
                    let code = number(body, 0).map_or(0, i32::from_ne_bytes);
                    return if code == 0 {
                        Ok(())
                    } else {
                        Err(io::Error::from_raw_os_error(code.wrapping_neg()))
                    };
                }
                _ => {}
            }
        }
    }
}

/// struct nlmsghdr and struct inet_diag_req_v2: all sockets of the family, with struct tcp_info.
fn request(family: libc::c_int) -> [u8; HEADER + 56] {
    let mut request = [0; HEADER + 56];
    let length = request.len() as u32;
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    request[..4].copy_from_slice(&length.to_ne_bytes());
    request[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request[6..8].copy_from_slice(&flags.to_ne_bytes());
    request[HEADER] = family as u8;
    request[HEADER + 1] = libc::IPPROTO_TCP as u8;
    request[HEADER + 2] = 1 << (INET_DIAG_INFO - 1);
    request[HEADER + 4..HEADER + 8].copy_from_slice(&STATES.to_ne_bytes());
    request
}

/// Takes the first message off: its type and its body.
fn cut_message<'a>(messages: &mut &'a [u8]) -> Option<(u16, &'a [u8])> {
    let length = u32::from_ne_bytes(number(messages, 0)?) as usize;
    let kind = u16::from_ne_bytes(number(messages, 4)?);
    Some((kind, cut(messages, length, HEADER)?))
}

/// Takes the first attribute off: its type and its value.
fn cut_attribute<'a>(attributes: &mut &'a [u8]) -> Option<(u16, &'a [u8])> {
    let length = u16::from_ne_bytes(number(attributes, 0)?).into();
    let kind = u16::from_ne_bytes(number(attributes, 2)?);
    Some((kind, cut(attributes, length, ATTRIBUTE)?))
}

/// Takes `length` bytes off, and the filling up to a multiple of four: what follows the header.
fn cut<'a>(bytes: &mut &'a [u8], length: usize, header: usize) -> Option<&'a [u8]> {
    let body = bytes.get(header..length)?;
    *bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some(body)
}

/// What struct inet_diag_msg and its attributes say; `None` without struct tcp_info, as in TIME_WAIT.
fn figures(body: &[u8]) -> Option<Figures> {
    let cookie = u64::from(u32::from_ne_bytes(number(body, COOKIE)?))
        | u64::from(u32::from_ne_bytes(number(body, COOKIE + 4)?)) << 32;
    let mut attributes = body.get(SOCKET..)?;
    let info = loop {
        let (kind, value) = cut_attribute(&mut attributes)?;
        if kind == INET_DIAG_INFO {
            break value;
        }
    };
    // An older kernel's struct tcp_info ends earlier.
    let short = |at| number(info, at).map_or(0, u32::from_ne_bytes);
    let long = |at| number(info, at).map_or(0, u64::from_ne_bytes);
    Some(Figures {
        cookie,
        state: *body.get(1)?,
        bytes_acked: long(offset_of!(libc::tcp_info, tcpi_bytes_acked)),
        bytes_received: long(offset_of!(libc::tcp_info, tcpi_bytes_received)),
        rtt_us: short(offset_of!(libc::tcp_info, tcpi_rtt)),
        total_retrans: short(offset_of!(libc::tcp_info, tcpi_total_retrans)),
    })
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ESTABLISHED: u8 = 1;

    /// A message of the kernel for a socket whose struct tcp_info has `info` bytes, all of them 1.
    fn message(info: usize) -> Vec<u8> {
        let attribute = |kind: u16, value: &[u8]| {
            let mut attribute = ((ATTRIBUTE + value.len()) as u16).to_ne_bytes().to_vec();
            attribute.extend(kind.to_ne_bytes());
            attribute.extend(value);
            attribute.resize(attribute.len().next_multiple_of(4), 0xff);
            attribute
        };
        let mut body = vec![0; SOCKET];
        body[1] = ESTABLISHED;
        body[COOKIE..COOKIE + 4].copy_from_slice(&9_u32.to_ne_bytes());
        body[COOKIE + 4..COOKIE + 8].copy_from_slice(&1_u32.to_ne_bytes());
        body.extend(attribute(8, &[3]));
        body.extend(attribute(INET_DIAG_INFO, &vec![1; info]));
        let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        message.resize(HEADER, 0);
        message.extend(body);
        message
    }

    #[test]
    fn what_an_older_kernel_does_not_tell_is_nought() {
        let read = |info| {
            let figures = figures(&message(info)[HEADER..]).unwrap();
            [figures.rtt_us.into(), figures.total_retrans.into(), figures.bytes_acked]
                .map(|figure| figure != 0)
        };
        assert_eq!(read(0), [false, false, false]);
        assert_eq!(read(104), [true, true, false]);
        assert_eq!(read(127), [true, true, false]);
        assert_eq!(read(128), [true, true, true]);
    }

    #[test]
    fn a_message_is_read_wherever_the_next_begins_and_refused_when_it_is_cut_off() {
        let whole = message(232);
        let two = [&whole[..], &whole[..]].concat();
        let mut rest = &two[..];
        for _ in 0..2 {
            let (kind, body) = cut_message(&mut rest).unwrap();
            assert_eq!(kind, SOCK_DIAG_BY_FAMILY);
            assert_eq!(figures(body).unwrap().cookie, 1 << 32 | 9);
        }
        assert!(rest.is_empty());
        for length in 0..whole.len() {
            assert!(cut_message(&mut &whole[..length]).is_none(), "{length}");
            assert!(figures(&whole[HEADER..length.max(HEADER)]).is_none(), "{length}");
        }
        let mut endless = whole.clone();
        endless[..4].copy_from_slice(&0_u32.to_ne_bytes());
        assert!(cut_message(&mut &endless[..]).is_none());
    }
}

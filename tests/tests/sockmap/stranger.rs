//! Somebody else who wants one of the sockets in a sockmap of their own.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use ambassador_tests::noise::Noise;
use anyhow::{Context, Result, ensure};

use super::*;

/// Of enum bpf_cmd, enum bpf_map_type, enum bpf_prog_type and enum bpf_attach_type in linux/bpf.h.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const SOCKMAP: u32 = 15;
const SK_MSG: u32 = 16;
const SK_MSG_VERDICT: u32 = 7;

#[test]
fn a_sockmap_of_somebody_else_takes_no_byte_away() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let connection = tier.connect(Blocking::No)?;
    let shortcut = connection.shortcut()?;
    const PIECE: usize = 64 << 10;
    let say = |seed| connection.say_up(&Noise::new(seed).bytes(PIECE));
    (0..8).try_for_each(say)?;
    let stranger = Stranger::new()?;
    let refused = stranger.take(connection.client.socket().as_raw_fd()).err();
    let refused = refused.and_then(|error| error.raw_os_error());
    ensure!(refused == Some(libc::EBUSY), "{refused:?}");
    (8..16).try_for_each(say)?;
    ensure!(shortcut.carried() >= 8 * PIECE as u64, "{} bytes", shortcut.carried());
    connection.ends_well(16 * PIECE as u64)
}

/// Its program could take elsewhere what the relay forwards, past what is redirected.
#[test]
fn connection_whose_upstream_somebody_else_has_keeps_to_the_relay() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let stranger = Stranger::new()?;
    let take = |ours: &socket2::Socket| {
        stranger.take(ours.as_raw_fd()).context("take the upstream's socket")
    };
    let connection = tier.connect_with(&tier.listener, Blocking::No, None, take)?;
    ensure!(connection.traffic.shortcut.get().is_none(), "it has a shortcut");
    for _ in 0..4 {
        connection.say_up(b"hello")?;
    }
    connection.ends_well(20)
}

/// A sockmap with a program that passes all messages on.
struct Stranger {
    map: OwnedFd,
    _program: OwnedFd,
}

impl Stranger {
    fn new() -> Result<Self> {
        let map = opened(bpf(MAP_CREATE, &[SOCKMAP, 4, 4, 1])).context("make a sockmap")?;
        // r0 = 1; exit
        let code: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];
        let licence = c"GPL";
        let (code, licence) = (split(code.as_ptr().addr()), split(licence.as_ptr().addr()));
        let program = [SK_MSG, 2, code[0], code[1], licence[0], licence[1]];
        let program = opened(bpf(PROG_LOAD, &program)).context("load a program")?;
        let attach = [map.as_raw_fd().cast_unsigned(), program.as_raw_fd().cast_unsigned()];
        bpf(PROG_ATTACH, &[attach[0], attach[1], SK_MSG_VERDICT]).context("attach it")?;
        Ok(Self { map, _program: program })
    }

    fn take(&self, socket: libc::c_int) -> io::Result<()> {
        let (key, value) = (0_u32, socket);
        let key = split((&raw const key).addr());
        let value = split((&raw const value).addr());
        let map = self.map.as_raw_fd().cast_unsigned();
        bpf(MAP_UPDATE, &[map, 0, key[0], key[1], value[0], value[1], 0, 0]).map(drop)
    }
}

/// An address in the two words that it takes.
fn split(address: usize) -> [u32; 2] {
    let bytes = (address as u64).to_ne_bytes();
    let (first, second) = bytes.split_at(4);
    [first, second].map(|half| u32::from_ne_bytes(half.try_into().unwrap_or_default()))
}

fn bpf(command: libc::c_int, attributes: &[u32]) -> io::Result<libc::c_int> {
    // Word by word, because so are the fields that are needed, and zero after them.
    let mut all = [0_u64; 16];
    for (at, word) in attributes.iter().enumerate() {
        let bytes = &mut all[at / 2].to_ne_bytes();
        bytes[at % 2 * 4..][..4].copy_from_slice(&word.to_ne_bytes());
        all[at / 2] = u64::from_ne_bytes(*bytes);
    }
    // SAFETY: the attributes and what they point to live as long as the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, all.as_ptr(), size_of_val(&all)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

fn opened(descriptor: io::Result<libc::c_int>) -> io::Result<OwnedFd> {
    // SAFETY: bpf(2) has just opened it for us.
    descriptor.map(|it| unsafe { OwnedFd::from_raw_fd(it) })
}

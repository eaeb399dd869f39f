//! Programs of somebody else in the kernel, of the few instructions that it takes to be in the way.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};

/// Of enum bpf_cmd, enum bpf_map_type, enum bpf_prog_type and enum bpf_attach_type in linux/bpf.h.
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const SOCKMAP: u32 = 15;
const SOCK_OPS: u32 = 13;
const SK_MSG: u32 = 16;
const CGROUP_SOCK_OPS: u32 = 3;
const SK_MSG_VERDICT: u32 = 7;
/// Programs of others may stand beside it.
const ALLOW_MULTI: u32 = 2;

/// Instructions, as the kernel reads them.
const RETURN_1: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];
const SET_NO_CALLBACKS: [u64; 2] = [0x0000_0000_0000_02b7, 0x0000_003b_0000_0085];

/// A sockmap with a program that passes all messages on.
#[derive(Debug)]
pub struct Sockmap {
    map: OwnedFd,
    _program: OwnedFd,
}

impl Sockmap {
    /// Makes it.
    pub fn new() -> Result<Self> {
        let map = opened(bpf(MAP_CREATE, &[SOCKMAP, 4, 4, 1])).context("make a sockmap")?;
        let program = load(SK_MSG, &RETURN_1)?;
        let attach = [map.as_raw_fd().cast_unsigned(), program.as_raw_fd().cast_unsigned()];
        bpf(PROG_ATTACH, &[attach[0], attach[1], SK_MSG_VERDICT]).context("attach it")?;
        Ok(Self { map, _program: program })
    }

    /// Puts a socket into it.
    pub fn take(&self, socket: libc::c_int) -> io::Result<()> {
        let (key, value) = (0_u32, socket);
        let key = split((&raw const key).addr());
        let value = split((&raw const value).addr());
        let map = self.map.as_raw_fd().cast_unsigned();
        bpf(MAP_UPDATE, &[map, 0, key[0], key[1], value[0], value[1], 0, 0]).map(drop)
    }
}

/// Has every connection of a cgroup, and of those below, tell nobody of what becomes of it any more, as often as
/// somebody has asked for that. Ends with the cgroup.
pub fn silence(cgroup: &Path) -> Result<()> {
    let program = load(SOCK_OPS, &[SET_NO_CALLBACKS, RETURN_1].concat())?;
    let cgroup = File::open(cgroup).context("open a cgroup")?;
    let attach = [cgroup.as_raw_fd().cast_unsigned(), program.as_raw_fd().cast_unsigned()];
    bpf(PROG_ATTACH, &[attach[0], attach[1], CGROUP_SOCK_OPS, ALLOW_MULTI])
        .map(drop)
        .context("attach to a cgroup")
}

fn load(kind: u32, code: &[u64]) -> Result<OwnedFd> {
    let licence = c"GPL";
    let (at, licence) = (split(code.as_ptr().addr()), split(licence.as_ptr().addr()));
    let program = [kind, code.len() as u32, at[0], at[1], licence[0], licence[1]];
    opened(bpf(PROG_LOAD, &program)).context("load a program")
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

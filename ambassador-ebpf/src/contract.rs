//! The contract between the halves: the names of programs and maps, and what the maps hold.
//!
//! Everything here is read by two compilers for two targets, so types are `repr(C)`, made of
//! integers only, without implicit padding, and their layout is asserted beside them.
#![no_std]

// This file is the root of a library, and would look for it beside itself, among the hooks.
#[path = "contract/sockmap.rs"]
pub mod sockmap;

/// The sock_ops program that counts what becomes of connections.
pub const TRACKER: &str = "tracker";

/// The map [`TRACKER`] counts in: a per-CPU array whose only element is [`ConnectionCounts`].
pub const CONNECTIONS: &str = "CONNECTIONS";

/// What became of the TCP connections of a cgroup, as far as one CPU saw it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionCounts {
    /// Connections opened from the cgroup that were established.
    pub opened: u64,
    /// Connections accepted in the cgroup that were established.
    pub accepted: u64,
    /// Connections opened from the cgroup that were never established.
    pub failed: u64,
    /// Established connections that have come to their end.
    pub closed: u64,
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<ConnectionCounts>() == 32);
    assert!(offset_of!(ConnectionCounts, opened) == 0);
    assert!(offset_of!(ConnectionCounts, accepted) == 8);
    assert!(offset_of!(ConnectionCounts, failed) == 16);
    assert!(offset_of!(ConnectionCounts, closed) == 24);
};

// SAFETY: `repr(C)`, integers only, and no padding, as asserted above.
#[cfg(not(target_arch = "bpf"))]
unsafe impl aya::Pod for ConnectionCounts {}

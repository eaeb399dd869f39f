//! The contract between the halves: the names of programs and maps, and what the maps hold.
//!
//! Everything here is read by two compilers for two targets, so types are `repr(C)`, made of
//! integers only, without implicit padding, and their layout is asserted beside them.
#![no_std]

// This file is the root of the library, and would look for them beside itself, among the hooks.
#[path = "contract/direct.rs"]
pub mod direct;
#[path = "contract/sockmap.rs"]
pub mod sockmap;

/// Grows with every change of what a map means, so that no half takes up with a half that reads it
/// differently: maps that are pinned outlive the program that made them.
pub const VERSION: u32 = 4;

/// A TCP address. IPv4 in its v4-mapped form.
///
/// Both fields are in network byte order, as the kernel hands them to programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Address {
    pub ip: [u32; 4],
    /// Its 16 bits as a number; the upper half is zero.
    pub port: u32,
}

impl Address {
    /// The address of the IPv4 socket address, in network byte order.
    #[must_use]
    #[inline(always)]
    pub const fn v4(ip: u32, port: u32) -> Self {
        Self { ip: [0, 0, V4_MAPPED, ip], port }
    }

    /// The IPv4 address, if this is one in its v4-mapped form.
    #[must_use]
    #[inline(always)]
    pub const fn as_v4(&self) -> Option<u32> {
        match self.ip {
            [0, 0, V4_MAPPED, ip] => Some(ip),
            _ => None,
        }
    }
}

/// The third word of every v4-mapped address.
const V4_MAPPED: u32 = 0xffff_u32.to_be();

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<Address>() == 20);
    assert!(offset_of!(Address, port) == 16);
};

// SAFETY: `repr(C)`, integers only, and no padding, as asserted above.
#[cfg(not(target_arch = "bpf"))]
unsafe impl aya::Pod for Address {}

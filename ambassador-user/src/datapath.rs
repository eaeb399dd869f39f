//! The kernel side of the data path: the eBPF object, loading it, attaching its programs, its maps.
//!
//! The only module that knows aya.

pub mod cgroup;
pub mod kernel;
pub mod known_bad;
pub mod messages;
pub mod mounts;
pub mod obstacle;
pub mod pins;
pub mod programs;
pub mod selftest;
pub mod sockmap;
pub mod tables;

/// The eBPF object that this binary carries.
pub struct Object {
    /// The ELF file, aligned as its parser wants it.
    pub bytes: &'static [u8],
    /// Its SHA-256, in hexadecimal.
    pub sha256: &'static str,
}

/// The object, unless this binary was built without: it has no kernel tiers then.
pub fn object() -> Option<Object> {
    #[cfg(bpf_object)]
    return Some(Object {
        bytes: aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ambassador.o")),
        sha256: env!("AMBASSADOR_BPF_SHA256"),
    });
    #[cfg(not(bpf_object))]
    None
}

//! The kernel side of the data path: the eBPF object, loading it, and attaching its programs.
//!
//! The only module that knows aya.

pub mod cgroup;
pub mod probe;
pub mod sockmap;
pub mod tracker;

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

//! An array of the kernel half, as memory that both halves see (BPF_F_MMAPABLE).

use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::AtomicU64;

use anyhow::{Context, Result, bail, ensure};
use aya::maps::Map;

use crate::datapath::programs::Maps;

/// The words of an array's elements. Which half writes a word is the contract's business.
#[derive(Debug)]
pub(super) struct Shared {
    words: NonNull<AtomicU64>,
    count: usize,
    words_per_element: usize,
}

impl Shared {
    /// Shares the array of this name, whose elements are so many bytes each.
    pub(super) fn new(maps: &mut Maps, name: &str, bytes: usize) -> Result<Self> {
        let Some(Map::Array(data)) = maps.0.remove(name) else { bail!("find the array {name}") };
        let elements =
            data.info().with_context(|| format!("ask for the size of {name}"))?.max_entries();
        ensure!(bytes.is_multiple_of(size_of::<AtomicU64>()), "its elements are not made of words");
        let length = elements as usize * bytes;
        // SAFETY: a mapping that the kernel places touches no other memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                data.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        ensure!(base != libc::MAP_FAILED, "map it into memory: {}", io::Error::last_os_error());
        Ok(Self {
            words: NonNull::new(base.cast()).context("it was mapped at null")?,
            count: length / size_of::<AtomicU64>(),
            words_per_element: bytes / size_of::<AtomicU64>(),
        })
    }

    /// The word of an element that begins so many bytes into it.
    pub(super) fn word(&self, element: u32, offset: usize) -> &AtomicU64 {
        &self.words()[element as usize * self.words_per_element + offset / size_of::<AtomicU64>()]
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is as long as this, page-aligned, lives as long as `self`, and is only ever
        // used as atomic words by this half.
        unsafe { slice::from_raw_parts(self.words.as_ptr(), self.count) }
    }
}

// SAFETY: atomic words may be used from every thread.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Drop for Shared {
    fn drop(&mut self) {
        let length = self.count * size_of::<AtomicU64>();
        // SAFETY: this is what was mapped, and nobody borrows it any more.
        unsafe { libc::munmap(self.words.as_ptr().cast(), length) };
    }
}

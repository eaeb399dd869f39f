//! The limit on open files, which thousands of connections with both their ends would hit.

use std::io;

use anyhow::{Result, ensure};

/// Raises the limit as far as is allowed, for this process and those it starts, and returns it.
pub(crate) fn allow_descriptors() -> Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a whole `rlimit`, which the kernel fills.
    let read = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    ensure!(read == 0, "read the limit on open files: {}", io::Error::last_os_error());
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the pointer is to a whole `rlimit`, which the kernel only reads.
    let raised = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    ensure!(raised == 0, "raise the limit on open files: {}", io::Error::last_os_error());
    Ok(limit.rlim_cur)
}

//! Memory: what a proxy's processes keep, and what the kernel keeps for sockets.

use std::fs;

use ambassador_tests::family;
use anyhow::{Context, Result};

/// Bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// All pages of the processes that are in memory.
    pub(crate) rss: u64,
    /// The same, with each shared page divided by the number of those who share it.
    pub(crate) pss: u64,
}

impl Memory {
    /// Of a process and its descendants, now.
    pub(crate) fn of(process: u32) -> Result<Self> {
        let mut sum = Self { rss: 0, pss: 0 };
        for member in family::of(process) {
            let path = format!("/proc/{member}/smaps_rollup");
            // A descendant may have ended meanwhile; the process itself must not.
            let rollup = match fs::read_to_string(&path) {
                Err(_) if member != process => continue,
                read => read.with_context(|| format!("read {path}"))?,
            };
            let field =
                |name| kibibytes(&rollup, name).with_context(|| format!("find {name} in {path}"));
            sum.rss += field("Rss:")? * 1024;
            sum.pss += field("Pss:")? * 1024;
        }
        Ok(sum)
    }
}

/// What the kernel holds that is made for connections, in bytes, of the whole machine.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    /// Bytes under way in the buffers of TCP sockets.
    pub(crate) buffers: u64,
    /// Its own small objects: sockets, files, what epoll and conntrack keep of them.
    pub(crate) objects: u64,
}

impl Kernel {
    /// Now.
    pub(crate) fn now() -> Result<Self> {
        let read = |path| fs::read_to_string(path).with_context(|| format!("read {path}"));
        let pages = pages_of_buffers(&read("/proc/net/sockstat")?)
            .context("find the memory of TCP in /proc/net/sockstat")?;
        let objects =
            kibibytes(&read("/proc/meminfo")?, "Slab:").context("find Slab in /proc/meminfo")?;
        Ok(Self { buffers: pages * page_size(), objects: objects * 1024 })
    }

    /// What has come since.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            buffers: self.buffers.saturating_sub(before.buffers),
            objects: self.objects.saturating_sub(before.objects),
        }
    }
}

/// One field of a file that counts in KiB.
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.trim().strip_suffix("kB")?.trim_end().parse().ok()
}

fn pages_of_buffers(sockstat: &str) -> Option<u64> {
    let line = sockstat.lines().find_map(|line| line.strip_prefix("TCP:"))?;
    line.split_whitespace().skip_while(|&word| word != "mem").nth(1)?.parse().ok()
}

fn page_size() -> u64 {
    // SAFETY: takes and returns numbers only.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_not_taken_for_another_that_begins_alike() {
        let rollup = "Rss:    8192 kB\nPss:    4096 kB\nPss_Dirty:    7 kB\n";
        assert_eq!(kibibytes(rollup, "Pss:"), Some(4096));
        assert_eq!(kibibytes(rollup, "Swap:"), None);
    }

    #[test]
    fn the_buffers_are_those_of_tcp() {
        let sockstat =
            "sockets: used 44\nTCP: inuse 13 orphan 0 tw 1 alloc 14 mem 170\nUDP: inuse 0 mem 9\n";
        assert_eq!(pages_of_buffers(sockstat), Some(170));
        assert_eq!(pages_of_buffers("TCP: inuse 13"), None);
    }
}

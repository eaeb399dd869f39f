//! What the kernel says of itself while a test runs: whether it complains, and whether it got back
//! the memory that it lent to sockets.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};

use crate::skip;
use crate::wait::until_true;

/// What the complaints of a kernel begin with that has found a fault in itself.
const COMPLAINTS: [&str; 6] =
    ["WARNING:", "BUG:", "Oops", "refcount_t:", "general protection fault", "rcu: INFO:"];

/// What may be lent to others meanwhile, and lies in reserve with each processor: 4 MiB.
const SLACK_PAGES: u64 = 1024;
const PAGE: u64 = 4096;

/// The kernel, watched since a test began.
#[derive(Debug)]
pub struct Kernel {
    log: Option<File>,
    lent_pages: u64,
    most_lent: u64,
}

impl Kernel {
    /// Begins to watch. Where its log cannot be read, that is a part of the test that is skipped.
    pub fn watch() -> Result<Self> {
        let log = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .and_then(|mut log| log.seek(SeekFrom::End(0)).map(|_| log));
        if let Err(error) = &log {
            skip::in_part(&format!("the kernel's log cannot be read: {error}"));
        }
        let lent_pages = lent_pages()?;
        Ok(Self { log: log.ok(), lent_pages, most_lent: lent_pages })
    }

    /// Notes what it lends to sockets at this moment.
    pub fn look(&mut self) -> Result<()> {
        self.most_lent = self.most_lent.max(lent_pages()?);
        Ok(())
    }

    /// Expects that whenever it was looked at, it had lent no more than so many sockets may hold of what they send and
    /// receive; says how much that was, in bytes.
    pub fn has_lent_to(&self, sockets: u64) -> Result<u64> {
        let lent = (self.most_lent - self.lent_pages) * PAGE;
        let allowed = sockets * (most("tcp_wmem")? + most("tcp_rmem")?) + SLACK_PAGES * PAGE;
        ensure!(lent <= allowed, "{lent} bytes, where {sockets} sockets may hold {allowed}");
        Ok(lent)
    }

    /// Expects that it has not complained since, and gets back what it lent.
    pub fn is_unharmed(mut self) -> Result<()> {
        let mut complaints = self.records().context("read the kernel's log")?;
        complaints.retain(|record| is_complaint(record));
        ensure!(complaints.is_empty(), "the kernel complains: {}", complaints.join("\n"));
        until_true("the memory of sockets to be given back", || {
            Ok(lent_pages()? <= self.lent_pages + SLACK_PAGES)
        })
        .with_context(|| {
            format!("{} pages, where {} had been", lent_pages().unwrap_or(0), self.lent_pages)
        })
    }

    /// What it has written to its log since.
    fn records(&mut self) -> io::Result<Vec<String>> {
        let mut records = Vec::new();
        let Some(log) = &mut self.log else { return Ok(records) };
        // Each read gives one record, whole.
        let mut record = [0; 8192];
        loop {
            match log.read(&mut record) {
                Ok(read) => records.push(String::from_utf8_lossy(&record[..read]).into_owned()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(records),
                // It went on while we did not look; the next read has what is still there.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn is_complaint(record: &str) -> bool {
    COMPLAINTS.iter().any(|complaint| record.contains(complaint))
}

/// What a socket's buffer may grow to, in bytes.
fn most(buffer: &str) -> Result<u64> {
    let limits = fs::read_to_string(format!("/proc/sys/net/ipv4/{buffer}"));
    let limits = limits.with_context(|| format!("read {buffer}"))?;
    let most = limits.split_whitespace().nth(2).context("find the last of three limits")?;
    most.parse().with_context(|| format!("parse {buffer}"))
}

/// How many pages TCP's sockets hold, of all namespaces.
fn lent_pages() -> Result<u64> {
    let statistics = fs::read_to_string("/proc/net/sockstat").context("read sockstat")?;
    let pages = statistics
        .lines()
        .find(|line| line.starts_with("TCP:"))
        .and_then(|line| line.split_whitespace().skip_while(|word| *word != "mem").nth(1))
        .context("find TCP's memory in /proc/net/sockstat")?;
    pages.parse().context("parse TCP's memory")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_logged_meanwhile_is_read() -> Result<()> {
        let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") else {
            crate::skip!("the kernel's log cannot be written");
        };
        let mut kernel = Kernel::watch()?;
        let line = format!("ambassador-tests: process {} was here", std::process::id());
        // Whole, and in one write(2): the log waits for the end of the line.
        log.write_all(format!("{line}\n").as_bytes())?;
        ensure!(kernel.records()?.iter().filter(|record| record.contains(&line)).count() == 1);
        ensure!(!kernel.records()?.iter().any(|record| record.contains(&line)));
        Ok(())
    }

    #[test]
    fn warnings_are_complaints_and_other_records_are_not() {
        assert!(is_complaint(
            "4,818,5401,-;WARNING: CPU: 1 PID: 77 at net/core/skmsg.c:1 f+0x1/0x2"
        ));
        assert!(is_complaint("1,819,5402,-;BUG: kernel NULL pointer dereference, address: 8"));
        assert!(!is_complaint("6,820,5403,-;EXT4-fs (vda): mounted filesystem"));
    }
}

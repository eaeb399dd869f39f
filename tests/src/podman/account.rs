//! What a container has used of memory and CPU, and what it may use, by the accounts of its cgroups: of
//! version 2, or of version 1 where the controllers are there.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cgroup;

/// Of the process that a container was started with, and its cgroup.
#[derive(Debug)]
pub struct Account {
    process: u32,
    directory: PathBuf,
    files: &'static Files,
}

/// How a version of cgroups calls its accounts. Those of sockets add to those of all else.
#[derive(Debug)]
struct Files {
    now: &'static [&'static str],
    peak: &'static [&'static str],
    limit: &'static str,
    events: &'static str,
}

const VERSION_2: Files = Files {
    now: &["memory.current"],
    peak: &["memory.peak"],
    limit: "memory.max",
    events: "memory.events",
};
const VERSION_1: Files = Files {
    now: &["memory.usage_in_bytes", "memory.kmem.tcp.usage_in_bytes"],
    peak: &["memory.max_usage_in_bytes", "memory.kmem.tcp.max_usage_in_bytes"],
    limit: "memory.limit_in_bytes",
    events: "memory.oom_control",
};

impl Account {
    /// None where no limit of memory is in force.
    pub(super) fn of(process: u32) -> Result<Option<Self>> {
        let group = cgroup::of(process)?;
        if group.join(VERSION_2.peak[0]).exists() {
            return Ok(Some(Self { process, directory: group, files: &VERSION_2 }));
        }
        let groups = format!("/proc/{process}/cgroup");
        let groups = fs::read_to_string(&groups).with_context(|| format!("read {groups}"))?;
        let own = groups.lines().find_map(|line| line.split_once(":memory:/"));
        let Some((_, own)) = own.filter(|(_, own)| !own.is_empty()) else { return Ok(None) };
        let directory = Path::new("/sys/fs/cgroup/memory").join(own);
        Ok(Some(Self { process, directory, files: &VERSION_1 }))
    }

    /// Bytes that are used now, those of the kernel included.
    pub fn memory(&self) -> Result<u64> {
        self.sum(self.files.now)
    }

    /// The most that it has used.
    pub fn peak(&self) -> Result<u64> {
        self.sum(self.files.peak)
    }

    /// What it may use.
    pub fn limit(&self) -> Result<u64> {
        self.sum(&[self.files.limit])
    }

    /// How often something was killed because that was not enough.
    pub fn killed(&self) -> Result<u64> {
        let events = self.read(self.files.events)?;
        let killed = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        killed.context("find the kills")?.parse().context("read the kills")
    }

    /// CPU that its process has used.
    pub fn cpu(&self) -> Result<Duration> {
        /// What /proc counts in, whatever the kernel's own tick is.
        const TICK: Duration = Duration::from_millis(10);
        let path = format!("/proc/{}/stat", self.process);
        let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        // Behind the name, which may have blanks in it.
        let (_, fields) =
            stat.rsplit_once(") ").with_context(|| format!("find a name in {path}"))?;
        let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<u32>);
        let ticks: u32 = ticks.sum::<Result<_, _>>().with_context(|| format!("read {path}"))?;
        Ok(TICK * ticks)
    }

    fn sum(&self, files: &[&str]) -> Result<u64> {
        let values = files.iter().map(|file| {
            let text = self.read(file)?;
            text.trim().parse::<u64>().with_context(|| format!("read a number in {file}: {text}"))
        });
        values.sum()
    }

    fn read(&self, file: &str) -> Result<String> {
        let path = self.directory.join(file);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }
}

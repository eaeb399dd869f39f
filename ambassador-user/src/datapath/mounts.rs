//! Where this process sees file systems of a kind, by proc_pid_mountinfo(5).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// All mounts of this process, as the kernel tells them.
pub fn read() -> Result<String> {
    fs::read_to_string("/proc/self/mountinfo").context("read the mounts")
}

/// Those of one kind: the root that each shows, and where.
pub fn of<'m>(kind: &str, mounts: &'m str) -> impl Iterator<Item = (&'m str, &'m Path)> {
    mounts.lines().filter_map(move |line| {
        // The fields after the separator begin with the type.
        let (fields, behind) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(3);
        let (root, place) = (fields.next()?, fields.next()?);
        (behind.split(' ').next()? == kind).then_some((root, Path::new(place)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_2_is_found_beside_version_1() {
        let mounts = "40 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      41 30 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let found: Vec<_> = of("cgroup2", mounts).collect();
        assert_eq!(found, [("/", Path::new("/sys/fs/cgroup/unified"))]);
    }
}

//! Control groups, to which the kernel half is attached.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// Where the cgroup v2 hierarchy is mounted: alone, or beside the controllers of version 1.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    find(&mounts).context("find a mounted cgroup v2 hierarchy in /proc/self/mounts")
}

fn find(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|mount| match *mount.split(' ').collect::<Vec<_>>() {
        [_, directory, "cgroup2", ..] => Some(PathBuf::from(directory)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_2_is_found_beside_version_1() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw,nosuid 0 0\n";
        assert_eq!(find(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
    }

    #[test]
    fn version_1_alone_is_not_enough() {
        assert_eq!(find("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"), None);
    }
}

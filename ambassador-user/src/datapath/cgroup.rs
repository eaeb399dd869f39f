//! The pod's control group, to which the kernel half is attached.
//!
//! A container sees its own cgroup as the root of the tree, so the pod's, which is the one above, must be
//! found where the host's tree is mounted: by the inode, which is the same in every view.

use std::fs::{self, DirEntry};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::mounts;
use crate::config::Cgroup;

/// What the kernel calls the tree of cgroup v2.
const KIND: &str = "cgroup2";
/// What a Pod lacks that does not show it, as deploy/ has it.
const MOUNT: &str = "mount hostPath /sys/fs/cgroup read-only at /host/cgroup (volume host-cgroup)";
/// A tree with more groups than this is not searched to its end.
const MOST_GROUPS: usize = 50_000;

/// The directory of the cgroup that is meant.
pub fn find(choice: &Cgroup) -> Result<PathBuf> {
    match choice {
        Cgroup::At(path) => {
            // Only there a directory of cgroup v2 has this file.
            ensure!(
                path.join("cgroup.controllers").exists(),
                "{} is not a cgroup v2 directory; name one with --cgroup",
                path.display()
            );
            Ok(path.clone())
        }
        Cgroup::Auto => {
            let mounts = mounts::read()?;
            let own = fs::read_to_string("/proc/self/cgroup").context("read the own cgroup")?;
            above_own(&mounts, &own)
        }
    }
}

/// What identifies a cgroup in every view of the tree.
pub fn inode(directory: &Path) -> Result<u64> {
    let found =
        fs::metadata(directory).with_context(|| format!("look at {}", directory.display()))?;
    Ok(found.ino())
}

/// This process in a cgroup of its own below another, until this is dropped.
pub struct Visit {
    group: PathBuf,
    /// Where it came from.
    home: PathBuf,
}

impl Visit {
    /// Moves the process there. Takes a tree that may be written to.
    pub fn below(cgroup: &Path) -> Result<Self> {
        let mounts = mounts::read()?;
        let own = fs::read_to_string("/proc/self/cgroup").context("read the own cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let view = mounts::of(KIND, &mounts).find(|(root, _)| *root == "/");
        let (_, view) = view.context("find a mounted cgroup v2 hierarchy")?;
        let group = cgroup.join(format!("ambassador-selftest-{}", std::process::id()));
        fs::create_dir(&group).with_context(|| format!("make {}", group.display()))?;
        let visit = Self { group, home: view.join(own) };
        enter(&visit.group)?;
        Ok(visit)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let left = enter(&self.home).and_then(|()| Ok(fs::remove_dir(&self.group)?));
        if let Err(error) = left {
            tracing::warn!("cannot leave {}: {error:#}", self.group.display());
        }
    }
}

fn enter(cgroup: &Path) -> Result<()> {
    // The kernel takes 0 for whoever writes it.
    fs::write(cgroup.join("cgroup.procs"), "0")
        .with_context(|| format!("enter {}", cgroup.display()))
}

/// The parent of the own cgroup, as these views of the tree show it.
fn above_own(mounts: &str, own: &str) -> Result<PathBuf> {
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
    let own = own.context("this machine has no cgroup v2 hierarchy")?;
    let trees: Vec<(&str, &Path)> = mounts::of(KIND, mounts).collect();
    let (_, view) = trees
        .iter()
        .find(|(root, _)| *root == "/")
        .with_context(|| format!("no cgroup v2 hierarchy is mounted here; {MOUNT}"))?;
    let container = view.join(own);
    let container = if own.is_empty() {
        // Of all groups only the root of the tree has no such file.
        ensure!(
            container.join("cgroup.events").exists(),
            "this process is in no Pod, but in the root cgroup; name the one to attach to with --cgroup"
        );
        let wanted = inode(&container)?;
        let others: Vec<_> = trees.iter().map(|(_, tree)| *tree).filter(|it| it != view).collect();
        let mut found = others.iter().filter_map(|tree| search(tree, wanted));
        found.next().with_context(|| not_shown(&others))?
    } else {
        container
    };
    // A container may have groups of its own within the one that its runtime made.
    let above = container.ancestors().skip(1);
    let mut above = above.take_while(|it| trees.iter().all(|(_, tree)| it != tree));
    let pod = above.find(|it| is_pod(it));
    // Any other group may hold more than one Pod.
    pod.map(Path::to_owned).with_context(|| {
        format!(
            "none of the cgroups above the own one, {}, is a Pod's; name the one to attach to with --cgroup",
            container.display()
        )
    })
}

/// That these views of the tree do not have the own cgroup, and what to mount.
fn not_shown(others: &[&Path]) -> String {
    let seen = match others {
        [] => "the pod's cgroup is not mounted".to_owned(),
        [tree, ..] => format!(
            "the pod's cgroup is not in the tree at {}, which is not the host's from its root on",
            tree.display()
        ),
    };
    format!("{seen}; {MOUNT}, or name the cgroup with --cgroup")
}

/// Whether a group is that of a Pod, by the name that its runtime gave it:
/// - kubelet, by itself: `kubepods/burstable/podUID`
/// - kubelet, through systemd: `kubepods-burstable-podUID.slice`, below other slices for kind
/// - podman, by itself: `libpod_parent/ID`
/// - podman, through systemd: `machine-libpod_pod_ID.slice`, or `user-libpod_pod_ID.slice`
fn is_pod(group: &Path) -> bool {
    let name = |group: &Path| group.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (own, above) = (name(group), group.parent().map(name).unwrap_or_default());
    let is_slice = own.ends_with(".slice");
    own.starts_with("pod") && !is_slice
        || is_slice && (own.contains("-pod") || own.contains("libpod_pod_"))
        || above == "libpod_parent"
}

/// The directory with this inode below a directory.
fn search(tree: &Path, wanted: u64) -> Option<PathBuf> {
    let mut unseen = vec![tree.to_owned()];
    let mut seen = 0;
    while let Some(directory) = unseen.pop() {
        seen += 1;
        if seen > MOST_GROUPS {
            return None;
        }
        // A group may go while it is looked at.
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        let groups = entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        for group in groups {
            let inode = |group: &DirEntry| group.metadata().map(|found| found.ino());
            if inode(&group).is_ok_and(|inode| inode == wanted) {
                return Some(group.path());
            }
            unseen.push(group.path());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a container sees it: its own group as the root, and the host's tree at another place.
    fn views(container: &Path, host: &Path) -> String {
        format!(
            "30 23 0:26 / {} ro,nosuid - cgroup2 cgroup ro\n\
             31 23 0:27 / /proc rw - proc proc rw\n\
             32 23 0:26 /../../.. {} ro - cgroup2 cgroup rw\n",
            container.display(),
            host.display()
        )
    }

    #[test]
    fn the_pod_is_found_above_the_container_by_inode() {
        let host = tempfile::tempdir().unwrap();
        let pod = host
            .path()
            .join("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice");
        let container = pod.join("cri-containerd-1.scope");
        fs::create_dir_all(&container).unwrap();
        fs::create_dir_all(pod.join("cri-containerd-2.scope")).unwrap();
        fs::write(container.join("cgroup.events"), "populated 1").unwrap();
        // Another path to the same inode.
        let view = tempfile::tempdir().unwrap();
        let view = view.path().join("own");
        std::os::unix::fs::symlink(&container, &view).unwrap();
        assert_eq!(above_own(&views(&view, host.path()), "0::/\n").unwrap(), pod);
    }

    #[test]
    fn without_the_host_s_tree_it_says_what_to_mount() {
        let own = tempfile::tempdir().unwrap();
        fs::write(own.path().join("cgroup.events"), "populated 1").unwrap();
        let mounts = format!("30 23 0:26 / {} ro - cgroup2 cgroup ro\n", own.path().display());
        let error = above_own(&mounts, "0::/\n").unwrap_err().to_string();
        assert!(error.contains("is not mounted; mount hostPath /sys/fs/cgroup"), "{error}");
        let other = tempfile::tempdir().unwrap();
        let error = above_own(&views(own.path(), other.path()), "0::/\n").unwrap_err().to_string();
        let tree = format!("is not in the tree at {}", other.path().display());
        assert!(error.contains(&tree) && error.contains(MOUNT), "{error}");
    }

    #[test]
    fn the_root_of_the_tree_is_no_pod() {
        let root = tempfile::tempdir().unwrap();
        let mounts = format!("30 23 0:26 / {} rw - cgroup2 cgroup rw\n", root.path().display());
        let error = above_own(&mounts, "0::/\n").unwrap_err().to_string();
        assert!(error.contains("in the root cgroup"), "{error}");
    }

    #[test]
    fn what_is_no_pod_is_not_taken_for_one() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        for own in ["0::/user.slice/session-1.scope\n", "0::/kubepods.slice/x.scope\n"] {
            let error = above_own(mounts, own).unwrap_err().to_string();
            assert!(error.contains("is a Pod's"), "{error}");
        }
    }

    #[test]
    fn a_pod_is_known_by_the_names_of_every_runtime() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        for (pod, container) in [
            // containerd and CRI-O, by kubelet itself and through systemd; the last is kind's.
            ("kubepods/burstable/pod1234", "5678"),
            ("kubepods/pod1234", "crio-5678"),
            (
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod12_34.slice",
                "cri-containerd-5678.scope",
            ),
            ("kubepods.slice/kubepods-pod12_34.slice", "crio-5678.scope/container"),
            (
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/\
                 kubelet-kubepods-besteffort-pod12.slice",
                "cri-containerd-5678.scope",
            ),
            // podman, by itself and through systemd.
            ("libpod_parent/1234", "libpod-5678"),
            ("machine.slice/machine-libpod_pod_1234.slice", "libpod-5678.scope/container"),
        ] {
            let found = above_own(mounts, &format!("0::/{pod}/{container}\n")).unwrap();
            assert_eq!(found, Path::new("/sys/fs/cgroup").join(pod));
        }
    }
}

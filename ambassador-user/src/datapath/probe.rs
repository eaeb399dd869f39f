//! Whether the kernel half can be used here, and if not, why not and what to change.

use std::fmt;

use caps::{CapSet, Capability};

use super::cgroup;
use super::object;
use super::tracker::Tracker;

/// What keeps the kernel half from being used.
#[derive(Debug)]
pub enum Obstacle {
    /// The binary carries no eBPF object.
    NotEmbedded,
    /// There is no cgroup v2 hierarchy to attach to.
    NoCgroup2,
    /// The process may not load programs.
    NotPermitted(Vec<Capability>),
    /// The kernel, or what guards it, refused.
    Refused(anyhow::Error),
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotEmbedded => f.write_str(
                "this binary was built without the eBPF object; \
                 build it with `cargo xtask build-ebpf` first",
            ),
            Self::NoCgroup2 => f.write_str(
                "no cgroup v2 hierarchy is mounted here; mount one, read-only is enough",
            ),
            Self::NotPermitted(missing) => {
                let missing: Vec<_> = missing.iter().map(Capability::to_string).collect();
                write!(f, "not permitted to load programs; grant {}", missing.join(" and "))
            }
            Self::Refused(error) => write!(
                f,
                "the kernel refused the programs, or a seccomp profile the system call: {error:#}"
            ),
        }
    }
}

impl std::error::Error for Obstacle {}

/// Loads the tracker for a moment. Attaches nothing and leaves nothing behind.
pub fn load() -> Result<(), Obstacle> {
    if object().is_none() {
        return Err(Obstacle::NotEmbedded);
    }
    if cgroup::mount_point().is_err() {
        return Err(Obstacle::NoCgroup2);
    }
    let missing = missing_capabilities();
    if !missing.is_empty() {
        return Err(Obstacle::NotPermitted(missing));
    }
    Tracker::load().map(drop).map_err(Obstacle::Refused)
}

/// Those capabilities that loading and attaching need, and the process does not have.
fn missing_capabilities() -> Vec<Capability> {
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
    // From before `CAP_BPF` was split off it, and still its superset.
    if has(Capability::CAP_SYS_ADMIN) && has(Capability::CAP_NET_ADMIN) {
        return Vec::new();
    }
    [Capability::CAP_BPF, Capability::CAP_NET_ADMIN]
        .into_iter()
        .filter(|&capability| !has(capability))
        .collect()
}

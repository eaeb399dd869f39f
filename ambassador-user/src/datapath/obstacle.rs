//! What keeps a kernel tier from being used, in words that say what to change.

use std::fmt;

use caps::{CapSet, Capability};

use super::object;

/// Why the kernel half cannot be used.
#[derive(Debug)]
pub enum Obstacle {
    /// The binary carries no eBPF object.
    NotEmbedded,
    /// The process may not load programs, and nobody has left it any.
    NotPermitted(Vec<Capability>),
    /// The pod's cgroup cannot be found or opened.
    NoCgroup(anyhow::Error),
    /// What somebody has left cannot be taken over.
    NotOurs(anyhow::Error),
    /// The kernel, or what guards it, refused.
    Refused(anyhow::Error),
    /// It does not do here what it has to.
    Fails(anyhow::Error),
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotEmbedded => f.write_str(
                "this binary was built without the eBPF object; \
                 build it with `cargo xtask build-ebpf` first",
            ),
            Self::NotPermitted(missing) => {
                let missing: Vec<_> = missing.iter().map(Capability::to_string).collect();
                write!(
                    f,
                    "not permitted to load programs; grant {}, or let `ambassador load` do it in an \
                     init container",
                    missing.join(" and ")
                )
            }
            Self::NoCgroup(error) | Self::NotOurs(error) => write!(f, "{error:#}"),
            Self::Refused(error) => write!(
                f,
                "the kernel refused the programs, or a seccomp profile the system call: {error:#}"
            ),
            Self::Fails(error) => write!(f, "the self-test failed: {error:#}"),
        }
    }
}

impl std::error::Error for Obstacle {}

/// What keeps this process from loading programs, as far as that can be known before it tries.
pub fn to_load() -> Result<(), Obstacle> {
    if object().is_none() {
        return Err(Obstacle::NotEmbedded);
    }
    // From before `CAP_BPF` was split off it, and still its superset.
    if has(Capability::CAP_SYS_ADMIN) && has(Capability::CAP_NET_ADMIN) {
        return Ok(());
    }
    let needed = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN];
    let missing: Vec<_> = needed.into_iter().filter(|&it| !has(it)).collect();
    if missing.is_empty() { Ok(()) } else { Err(Obstacle::NotPermitted(missing)) }
}

/// Whether programs that this process loads may look into the kernel's own structures.
pub fn may_trace() -> bool {
    has(Capability::CAP_PERFMON) || has(Capability::CAP_SYS_ADMIN)
}

fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

//! What keeps a kernel tier from being used, in words that say what to change.

use std::fmt;

use aya::programs::ProgramError;
use caps::{CapSet, Capability};

use super::object;
use crate::privileges;

/// Why the kernel half cannot be used.
#[derive(Debug)]
pub enum Obstacle {
    /// The binary carries no eBPF object.
    NotEmbedded,
    /// No route could use it when the ambassador began, and what it takes is given up since.
    NotUsed,
    /// The process may not load programs, and nobody has left it any.
    NotPermitted(Vec<Capability>),
    /// The pod's cgroup cannot be found or opened.
    NoCgroup(anyhow::Error),
    /// What somebody has left cannot be taken over.
    NotOurs(anyhow::Error),
    /// It cannot be left for another process.
    NotPinned(anyhow::Error),
    /// The kernel, or what guards it, refused.
    Refused(anyhow::Error),
    /// Neither tier does here what it has to, each for its reason.
    Fails { direct: String, sockmap: String },
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotEmbedded => f.write_str(
                "this binary was built without the eBPF object; \
                 build it with `cargo xtask build-ebpf` first",
            ),
            Self::NotUsed => f.write_str(
                "none of the routes that the ambassador began with could use it, and it has given up what \
                 it takes: restart it",
            ),
            Self::NotPermitted(missing) => {
                let missing: Vec<_> = missing.iter().map(Capability::to_string).collect();
                // Kubernetes leaves out what the kernel begins each name with.
                let of_pod: Vec<_> =
                    missing.iter().map(|name| name.trim_start_matches("CAP_")).collect();
                write!(
                    f,
                    "not permitted to load programs; grant {} (in a Pod: securityContext with runAsUser: 0 \
                     and capabilities.add: [{}]), or let `ambassador load` do it in an init container",
                    listed(&missing),
                    of_pod.join(", ")
                )
            }
            Self::NoCgroup(error) | Self::NotOurs(error) | Self::NotPinned(error) => {
                write!(f, "{error:#}")
            }
            Self::Refused(error) => f.write_str(&refused(error)),
            Self::Fails { direct, .. } => f.write_str(direct),
        }
    }
}

impl std::error::Error for Obstacle {}

impl Obstacle {
    /// The same of `sockmap`, which takes one capability more.
    #[must_use]
    pub fn of_sockmap(&self) -> String {
        match self {
            Self::NotPermitted(missing) if !may_trace() => {
                Self::NotPermitted([&missing[..], &[privileges::TO_TRACE]].concat()).to_string()
            }
            Self::Fails { sockmap, .. } => sockmap.clone(),
            _ => self.to_string(),
        }
    }
}

/// As people list things.
fn listed(names: &[String]) -> String {
    match names.split_last() {
        Some((last, others)) if !others.is_empty() => format!("{} and {last}", others.join(", ")),
        _ => names.concat(),
    }
}

/// An error of the kernel's, and what else may be behind it.
pub fn refused(error: &anyhow::Error) -> String {
    format!(
        "the kernel refused the programs, or a seccomp profile the system call (in a Pod: \
         securityContext with seccompProfile: {{ type: Unconfined }}): {}",
        one_line(error)
    )
}

/// An error, without the pages that a verifier writes about a program that it rejects but for its reason.
pub fn one_line(error: &anyhow::Error) -> String {
    let parts = error.chain().map(|part| match part.downcast_ref() {
        Some(ProgramError::LoadError { verifier_log, .. }) => {
            tracing::debug!("the verifier's log: {verifier_log}");
            format!("the verifier says \"{}\"", reason(&verifier_log.to_string()))
        }
        _ => part.to_string(),
    });
    parts.collect::<Vec<_>>().join(": ")
}

/// The last line of a verifier's log that is no statistics.
fn reason(log: &str) -> &str {
    const STATISTICS: [&str; 3] = ["verification time ", "stack depth ", "processed "];
    let says = |line: &&str| !line.is_empty() && !STATISTICS.iter().any(|it| line.starts_with(it));
    log.lines().rev().find(says).unwrap_or("nothing")
}

/// What keeps this process from loading programs, as far as that can be known before it tries.
pub fn to_load() -> Result<(), Obstacle> {
    if object().is_none() {
        return Err(Obstacle::NotEmbedded);
    }
    // From before `CAP_BPF` was split off it, and still its superset.
    if has(Capability::CAP_SYS_ADMIN) && has(Capability::CAP_NET_ADMIN) {
        return Ok(());
    }
    let missing: Vec<_> = privileges::TO_LOAD.into_iter().filter(|&it| !has(it)).collect();
    if missing.is_empty() { Ok(()) } else { Err(Obstacle::NotPermitted(missing)) }
}

/// Whether programs that this process loads may look into the kernel's own structures.
pub fn may_trace() -> bool {
    has(privileges::TO_TRACE) || has(Capability::CAP_SYS_ADMIN)
}

fn has(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_listed_as_people_do() {
        let all = ["A", "B", "C"].map(str::to_owned);
        assert_eq!([1, 2, 3].map(|many| listed(&all[..many])), ["A", "A and B", "A, B and C"]);
    }

    #[test]
    fn of_a_verifier_s_log_the_reason_is_told() {
        let log = "127: (07) r7 += 1   ; R7=scalar()\nThe sequence of 8193 jumps is too complex.\n\
                   verification time 238251 usec\nstack depth 216+24\nprocessed 43599 insns (limit 1000000)\n";
        assert_eq!(reason(log), "The sequence of 8193 jumps is too complex.");
        assert_eq!(reason(""), "nothing");
    }
}

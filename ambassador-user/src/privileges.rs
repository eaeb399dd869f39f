//! The one place that gives privileges up, and that says what is held, needed and dropped.
//!
//! Capabilities belong to threads, so this runs before the runtime starts any.

use std::io;

use anyhow::{Context, Result};
use caps::{CapSet, Capability, CapsHashSet};
use tracing::info;

/// What this process needs after its sockets are bound and the kernel half is attached: nothing, except
/// that kernels before 5.19 let nobody without it use a map.
pub const NEEDED_FOR_MAPS: Capability = Capability::CAP_BPF;

/// What loads and attaches the kernel half, while starting. `deploy/` grants these; tidy holds it to them.
pub const TO_LOAD: [Capability; 2] = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN];

/// What the programs of `sockmap` take besides: they look into the kernel's own structures.
pub const TO_TRACE: Capability = Capability::CAP_PERFMON;

/// What `load --for` takes besides: to give what is pinned to another user, and, from the second time on,
/// to see whether that user's ambassador runs.
pub const TO_HAND_OVER: [Capability; 2] = [Capability::CAP_CHOWN, Capability::CAP_DAC_READ_SEARCH];

/// Drops everything that is not needed, for good, and says so.
pub fn drop_all(uses_maps: bool) -> Result<()> {
    let held = caps::read(None, CapSet::Permitted).context("read the capabilities")?;
    let mut needed = CapsHashSet::new();
    if uses_maps && !maps_are_free() && held.contains(&NEEDED_FOR_MAPS) {
        needed.insert(NEEDED_FOR_MAPS);
    }
    let dropped = &held - &needed;
    narrow(&dropped, &needed)?;
    no_new_privileges().context("set no_new_privs")?;
    info!(
        uid = effective_user(),
        held = %list(&held),
        needed = %list(&needed),
        dropped = %list(&dropped),
        "privileges"
    );
    Ok(())
}

/// Drops everything but one capability, for this thread alone.
pub fn keep_only(needed: Capability) -> Result<()> {
    let held = caps::read(None, CapSet::Permitted).context("read the capabilities")?;
    let needed = CapsHashSet::from([needed]);
    narrow(&(&held - &needed), &needed)?;
    no_new_privileges().context("set no_new_privs")
}

fn narrow(dropped: &CapsHashSet, needed: &CapsHashSet) -> Result<()> {
    // The bounding set limits what an exec could regain; changing it takes a capability itself.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).unwrap_or(false) {
        for capability in dropped {
            caps::drop(None, CapSet::Bounding, *capability)
                .with_context(|| format!("drop {capability} from the bounding set"))?;
        }
    }
    for set in [CapSet::Ambient, CapSet::Inheritable] {
        caps::clear(None, set).with_context(|| format!("clear the {set:?} capabilities"))?;
    }
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, needed).with_context(|| format!("set the {set:?} capabilities"))?;
    }
    Ok(())
}

/// The capabilities this process has now, for people.
pub fn held() -> String {
    caps::read(None, CapSet::Permitted).map_or_else(|error| error.to_string(), |held| list(&held))
}

/// The user this process acts as.
pub fn effective_user() -> u32 {
    // SAFETY: geteuid(2) takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}

/// Its group.
pub fn effective_group() -> u32 {
    // SAFETY: getegid(2) takes nothing and cannot fail.
    unsafe { libc::getegid() }
}

/// Whether a map that is open can be used without privileges: since Linux 5.19, whatever
/// `kernel.unprivileged_bpf_disabled` says.
fn maps_are_free() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut parts = release.split(['.', '-']).map_while(|part| part.trim().parse::<u32>().ok());
    (parts.next(), parts.next()) >= (Some(5), Some(19))
}

fn no_new_privileges() -> io::Result<()> {
    // SAFETY: this prctl(2) takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn list(set: &CapsHashSet) -> String {
    if set.is_empty() {
        return "none".to_owned();
    }
    if set == &caps::all() {
        return "all".to_owned();
    }
    let mut names: Vec<_> = set.iter().map(ToString::to_string).collect();
    names.sort_unstable();
    names.join(",")
}

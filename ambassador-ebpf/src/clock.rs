//! The clock of all programs, and of user space where it writes to their maps.

use aya_ebpf::helpers::bpf_ktime_get_boot_ns;

/// Nanoseconds since the boot, of which suspension is a part.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: takes nothing.
    unsafe { bpf_ktime_get_boot_ns() }
}

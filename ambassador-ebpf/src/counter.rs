//! Counters that programs on several CPUs change at once.

use core::arch::asm;

/// Adds to a counter in a map, in one instruction.
///
/// A plain addition would lose counts to other CPUs, and to a packet that interrupts it. The target
/// has no atomic types.
#[inline(always)]
pub(crate) fn add(counter: *mut u64, count: i64) {
    // SAFETY: callers hand in the address of an aligned `u64` in the element of a map, alive as long
    // as the program runs; nothing holds a reference to it.
    unsafe {
        asm!(
            "lock *(u64 *)({counter} + 0) += {count}",
            counter = in(reg) counter,
            count = in(reg) count,
            options(nostack),
        );
    }
}

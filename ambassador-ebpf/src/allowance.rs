//! How many clients may be enrolled for nothing: what it costs, a connection of a single request never earns
//! back.
//!
//! The allowance grows with time. A client that is enrolled takes one from it, and gives it back when it goes
//! on. So those that stay are enrolled however many come, and of a storm of short ones only a few are.

use crate::clock;
use crate::maps::sockmap::ALLOWANCE;

/// As large as the pools that apps open at once.
const MOST: u64 = 1024;
/// It takes 2^21 ns to grow by one: so 477 a second may come to nothing, which is less than a hundredth of a CPU.
const GROWTH_SHIFT: u64 = 21;

/// What is left, and when that was counted.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Allowance {
    left: u64,
    counted: u64,
}

/// Takes one, if any is left. Should two CPUs take the last one at once, both have it.
pub(crate) fn take() -> bool {
    let Some(allowance) = ALLOWANCE.get_ptr_mut(0) else { return false };
    // SAFETY: an element of an array, of integers, for which every value is valid.
    let mut now = unsafe { allowance.read_volatile() };
    let time = clock::now();
    let grown = (time - now.counted) >> GROWTH_SHIFT;
    if grown > 0 {
        now = Allowance { left: (now.left + grown).min(MOST), counted: time };
    }
    let taken = now.left > 0;
    if taken {
        now.left -= 1;
    }
    // SAFETY: see above.
    unsafe { allowance.write_volatile(now) };
    taken
}

/// Gives one back.
pub(crate) fn give_back() {
    let Some(allowance) = ALLOWANCE.get_ptr_mut(0) else { return };
    // SAFETY: an element of an array, of integers, for which every value is valid.
    let left = unsafe { &mut (*allowance).left };
    *left = (*left + 1).min(MOST);
}

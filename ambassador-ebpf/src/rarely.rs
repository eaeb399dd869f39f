//! Keeps what the programs log from filling the log: one line a second, over all of them.

use crate::clock;
use crate::maps::LOGGED;

const PAUSE_NS: u64 = 1_000_000_000;

/// Whether something may be logged now.
#[inline(always)]
pub(crate) fn rarely() -> bool {
    let Some(logged) = LOGGED.get_ptr_mut(0) else { return false };
    let now = clock::now();
    // SAFETY: an element of an array; should two programs come at once, both log.
    let last = unsafe { logged.read_volatile() };
    if now - last < PAUSE_NS {
        return false;
    }
    // SAFETY: see above.
    unsafe { logged.write_volatile(now) };
    true
}

//! Memory that user space writes while it is being read.

/// Reads a value once, now.
pub(crate) fn read<T: Copy>(value: &T) -> T {
    // SAFETY: the reference is valid, and each word of what it leads to is written in one piece.
    unsafe { core::ptr::from_ref(value).read_volatile() }
}

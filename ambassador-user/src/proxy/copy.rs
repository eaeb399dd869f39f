//! The `copy` carrier: bytes pass through user space.
//!
//! Every thread has one scratch buffer that all its connections share, because a read is followed at
//! once by its write. Only what the receiver does not accept is kept, in a buffer of exactly that size,
//! so an idle connection holds no memory at all and a blocked one at most [`SCRATCH`] bytes a direction.

use std::cell::RefCell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;

use super::socket::{Pulled, receive, send};

/// As much as a direction takes in one read.
const SCRATCH: usize = 64 * 1024;

thread_local! {
    static BUFFER: RefCell<Box<[MaybeUninit<u8>]>> =
        RefCell::new(Box::new_uninit_slice(SCRATCH));
}

/// What was read and not yet accepted.
#[derive(Debug, Default)]
pub struct Copy {
    kept: Box<[u8]>,
    given: usize,
}

impl Copy {
    pub fn held(&self) -> usize {
        self.kept.len() - self.given
    }

    /// Reads from `from` and passes on to `to` what it accepts right away. Nothing may be held.
    pub fn pull(&mut self, from: RawFd, to: RawFd) -> io::Result<Pulled> {
        BUFFER.with_borrow_mut(|buffer| {
            let taken = receive(from, buffer)?;
            // SAFETY: recv(2) has written the first `taken` bytes of the buffer.
            let bytes = unsafe { buffer[..taken].assume_init_ref() };
            // Whatever the error is, the next `push` meets it again, where it has a side to blame.
            let passed = if taken == 0 { 0 } else { send(to, bytes).unwrap_or(0) };
            if passed < taken {
                self.kept = bytes[passed..].into();
                self.given = 0;
            }
            Ok(Pulled { taken, passed, short: taken < SCRATCH })
        })
    }

    /// Passes on what is held.
    pub fn push(&mut self, to: RawFd) -> io::Result<usize> {
        let sent = send(to, &self.kept[self.given..])?;
        self.given += sent;
        if self.held() == 0 {
            *self = Self::default();
        }
        Ok(sent)
    }
}

//! A stream of bytes that is known beforehand, so that one that is lost, twice there or out of place shows
//! at once; in pieces of every size.

use std::num::Wrapping;

use anyhow::{Result, ensure};

/// The stream repeats itself after so many bytes: a number that no buffer's size divides.
const PERIOD: usize = 131_101;
/// No piece is larger.
const PIECE: usize = 64 * 1024;

/// The stream, and how much of it has been sent or received.
pub(super) struct Bytes {
    /// A period, and a piece's length of the next.
    noise: Vec<u8>,
    sizes: Noise,
    pub(super) position: u64,
}

/// Numbers that repeat in every run (xorshift64, Marsaglia).
struct Noise(Wrapping<u64>);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.0
    }
}

impl Bytes {
    pub(super) fn new() -> Self {
        let mut noise = Noise(Wrapping(0x9e37_79b9_7f4a_7c15));
        let mut bytes = Vec::with_capacity(PERIOD + PIECE);
        while bytes.len() < PERIOD {
            bytes.extend(noise.next().to_ne_bytes());
        }
        bytes.truncate(PERIOD);
        bytes.extend_from_within(..PIECE);
        Self { noise: bytes, sizes: noise, position: 0 }
    }

    /// What comes next, in a piece of any size.
    pub(super) fn piece(&mut self) -> &[u8] {
        let length = self.sizes.next() as usize % PIECE + 1;
        &self.ahead()[..length]
    }

    /// Takes in what has arrived: it must be what comes next.
    pub(super) fn take(&mut self, arrived: &[u8]) -> Result<()> {
        for part in arrived.chunks(PIECE) {
            ensure!(
                self.ahead()[..part.len()] == *part,
                "other bytes arrived than were sent, within {} of byte {}",
                part.len(),
                self.position
            );
            self.position += part.len() as u64;
        }
        Ok(())
    }

    /// At least a piece's length.
    fn ahead(&self) -> &[u8] {
        &self.noise[(self.position % PERIOD as u64) as usize..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(length: usize) -> Vec<u8> {
        let (mut bytes, mut stream) = (Bytes::new(), Vec::new());
        while stream.len() < length {
            let piece = bytes.piece().to_vec();
            bytes.position += piece.len() as u64;
            stream.extend(piece);
        }
        stream
    }

    #[test]
    fn what_was_sent_is_what_comes_next() {
        let sent = stream(3 * PERIOD);
        let mut received = Bytes::new();
        sent.chunks(1000).for_each(|chunk| received.take(chunk).unwrap());
        assert_eq!(received.position, sent.len() as u64);
    }

    #[test]
    fn a_byte_that_is_lost_or_twice_there_or_out_of_place_shows() {
        let sent = stream(PERIOD);
        let mut lost = sent.clone();
        lost.remove(70_000);
        let mut twice = sent.clone();
        twice.insert(70_000, sent[70_000]);
        let mut moved = sent;
        moved[70_000..70_100].rotate_left(1);
        for stream in [lost, twice, moved] {
            assert!(Bytes::new().take(&stream).is_err());
        }
    }
}

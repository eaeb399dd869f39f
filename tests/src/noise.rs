//! Reproducible randomness: the same seed gives the same bytes, so that a receiver knows what must
//! arrive without being told.

/// An endless stream of pseudo-random numbers and bytes (splitmix64).
#[derive(Debug, Clone)]
pub struct Noise {
    state: u64,
    pending: [u8; 8],
    used: usize,
}

impl Noise {
    /// The stream that belongs to this seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed, pending: [0; 8], used: 8 }
    }

    /// The next number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// The next bytes of the stream, however the reader slices it.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        let left_over = buffer.len().min(self.pending.len() - self.used);
        let (first, rest) = buffer.split_at_mut(left_over);
        first.copy_from_slice(&self.pending[self.used..][..left_over]);
        self.used += left_over;
        let mut words = rest.chunks_exact_mut(8);
        for word in &mut words {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
        let last = words.into_remainder();
        if !last.is_empty() {
            self.pending = self.next().to_le_bytes();
            self.used = last.len();
            last.copy_from_slice(&self.pending[..self.used]);
        }
    }

    /// The next `length` bytes.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.fill(&mut bytes);
        bytes
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slicing_does_not_change_the_stream() {
        let whole = Noise::new(7).bytes(1000);
        let mut slices = Noise::new(7);
        let mut parts = Vec::new();
        for length in (0..).take_while(|length| length * (length + 1) / 2 <= 1000) {
            parts.extend(slices.bytes(length));
        }
        assert_eq!(parts, whole[..parts.len()]);
        assert_ne!(Noise::new(8).bytes(1000), whole);
    }
}

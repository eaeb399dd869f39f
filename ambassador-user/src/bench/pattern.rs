//! The bytes that are sent: the receiver knows each one by its place in the stream, so a byte that
//! is lost, doubled, swapped or changed is found, and where.

use std::sync::LazyLock;

/// The most that [`at`] gives at once, and what senders write and receivers read at a time.
pub const CHUNK: usize = 128 * 1024;

/// A prime, so that a loss of whole pages or whole buffers cannot go unseen.
const PERIOD: usize = 65_521;

/// The next bytes of the stream from `position` on: `length` of them, at most [`CHUNK`].
pub fn at(position: u64, length: usize) -> &'static [u8] {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let period: Vec<u8> = std::iter::repeat_with(|| {
            // xorshift64: cheap, and no byte tells the next.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .take(PERIOD)
        .collect();
        period.iter().copied().cycle().take(PERIOD + CHUNK).collect()
    });
    let start = (position % PERIOD as u64) as usize;
    &BYTES[start..start + length]
}

/// The place in the stream of the first byte that is not what was sent, if there is one.
pub fn first_wrong(position: u64, received: &[u8]) -> Option<u64> {
    let sent = at(position, received.len());
    // One comparison of the whole is what is fast enough to be done on every byte.
    if sent == received {
        return None;
    }
    let offset = sent.iter().zip(received).position(|(sent, received)| sent != received)?;
    Some(position + offset as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_is_right_wherever_it_is_cut() {
        let stream: Vec<u8> = (0..4).flat_map(|n| at(n * 50_000, 50_000).to_vec()).collect();
        assert_eq!(first_wrong(0, &stream[..CHUNK]), None);
        assert_eq!(first_wrong(70_001, &stream[70_001..70_002]), None);
        assert_eq!(first_wrong(CHUNK as u64, &stream[CHUNK..]), None);
    }

    #[test]
    fn a_changed_byte_is_named_by_its_place() {
        let mut received = at(1_000, 500).to_vec();
        received[77] ^= 1;
        assert_eq!(first_wrong(1_000, &received), Some(1_077));
    }

    #[test]
    fn a_lost_page_is_seen() {
        assert!(first_wrong(0, at(4096, 64)).is_some());
        assert!(first_wrong(0, at(65_536, 64)).is_some());
    }
}

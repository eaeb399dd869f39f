//! Somebody else who wants one of the sockets in a sockmap of their own.

use ambassador_tests::stranger::Sockmap;

use super::*;

#[test]
fn a_sockmap_of_somebody_else_takes_no_byte_away() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let connection = tier.connect(Blocking::No)?;
    let shortcut = connection.shortcut()?;
    const PIECE: usize = 64 << 10;
    let say = |seed| connection.say_up(&Noise::new(seed).bytes(PIECE));
    (0..8).try_for_each(say)?;
    let stranger = Sockmap::new()?;
    let refused = stranger.take(connection.client.socket().as_raw_fd()).err();
    let refused = refused.and_then(|error| error.raw_os_error());
    ensure!(refused == Some(libc::EBUSY), "{refused:?}");
    (8..16).try_for_each(say)?;
    ensure!(shortcut.carried() >= 8 * PIECE as u64, "{} bytes", shortcut.carried());
    connection.ends_well(16 * PIECE as u64)
}

/// Its program could take elsewhere what the relay forwards, past what is redirected.
#[test]
fn connection_whose_upstream_somebody_else_has_keeps_to_the_relay() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let stranger = Sockmap::new()?;
    let take = |ours: &socket2::Socket| {
        stranger.take(ours.as_raw_fd()).context("take the upstream's socket")
    };
    let connection = tier.connect_with(&tier.listener, Blocking::No, None, take)?;
    ensure!(connection.traffic.shortcut.get().is_none(), "it has a shortcut");
    for _ in 0..4 {
        connection.say_up(b"hello")?;
    }
    connection.ends_well(20)
}

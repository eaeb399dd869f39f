//! A reset of the upstream, of which whoever writes into its socket may be told in the place of the relay.

use std::thread::scope;

use ambassador::datapath::obstacle;
use ambassador::datapath::sockmap::Enrol;
use ambassador_tests::skip;
use ambassador_tests::wait::{SOON, until, until_true};
use anyhow::{Context, Result};

use crate::tier::{Blocking, Connection, Tier};
use crate::{BYTES, limits};

/// The kernel tells of a reset once, and here it tells the client, in the upstream's socket, where its write waits
/// for room; and as a part was written, the client is not told.
#[test]
fn reset_that_meets_a_redirected_write_is_no_end() -> Result<()> {
    if let Err(obstacle) = obstacle::to_load() {
        skip!("{obstacle}");
    }
    let tier = Tier::new(Enrol::Anybody, limits(BYTES)?)?;
    let connection = tier.connect_with(&tier.listener, Blocking::Yes, Some(1), |_| Ok(()))?;
    connection.until_latched()?;
    connection.upstream.set_send_buffer_size(1).context("leave the upstream's socket no room")?;
    let stopped = tier.stop_relays()?;
    let Connection { client, server, traffic, .. } = connection;
    let shortcut = traffic.shortcut.get().context("find the shortcut")?;
    let carried = shortcut.carried();
    scope(|scope| {
        // More than its server takes in, and less than the budget.
        let writing = scope.spawn(|| client.socket().send(&[0; 100_000]));
        until_true("the write to be redirected", || Ok(shortcut.carried() > carried))?;
        server.reset()?;
        // Told of it or not: that is a matter of when the reset came.
        let _ = writing.join().expect("the writer does not panic");
        drop(stopped);
        // A blocking read is also woken, and ended, by what is no reset.
        client.socket().set_nonblocking(true).context("make a client non-blocking")?;
        client.hear_reset()
    })
}

/// The same after the end of the server's stream, which the relay does not take for all that has come then.
#[test]
fn reset_behind_an_end_that_meets_a_redirected_write_is_passed_on() -> Result<()> {
    let tier = tier!(Enrol::Unnoticed);
    let connection = tier.connect(Blocking::No)?;
    connection.until_latched()?;
    let stopped = tier.stop_relays()?;
    let Connection { client, server, .. } = connection;
    server.finish()?;
    server.reset()?;
    until("a write to meet the reset", SOON, || Ok(client.socket().send(b"x").err()))?;
    drop(stopped);
    client.hear_reset()
}

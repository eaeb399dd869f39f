//! Nothing is lost, reordered or repeated: hundreds of connections with random sizes and pauses, both
//! directions at once.

use std::time::Duration;

use anyhow::{Context, Result};

use ambassador_tests::noise::Noise;
use ambassador_tests::on_every_way;
use ambassador_tests::peer::Peer;
use ambassador_tests::way::{Bytes, Way, Wire};

/// Rounds of connections, and how many are open at once in each.
const ROUNDS: u64 = 5;
const AT_ONCE: u64 = 50;

on_every_way! { tcp: Tcp; random_traffic_arrives_intact }
on_every_way! { unix: Unix; random_traffic_arrives_intact }

fn random_traffic_arrives_intact(wire: &Wire) -> Result<()> {
    for round in 0..ROUNDS {
        std::thread::scope(|scope| {
            let connections: Vec<_> = (0..AT_ONCE)
                .map(|number| {
                    let seed = round * AT_ONCE + number;
                    let pair = wire.pair()?;
                    Ok(scope
                        .spawn(move || talk(pair, seed).with_context(|| format!("seed {seed}"))))
                })
                .collect::<Result<_>>()?;
            connections
                .into_iter()
                .try_for_each(|talk| talk.join().expect("a conversation does not panic"))
        })?;
    }
    if wire.road.way == Way::Sockmap {
        // A server that has finished before the ambassador looks is left to `splice`.
        return Ok(());
    }
    let all = 0..ROUNDS * AT_ONCE;
    let sum = |lengths: &dyn Fn(u64) -> usize| all.clone().map(|seed| lengths(seed) as u64).sum();
    let bytes = Bytes { up: sum(&|seed| length(up(seed))), down: sum(&|seed| length(down(seed))) };
    wire.road.has_carried(ROUNDS * AT_ONCE, Some(bytes))
}

/// Both ends talk at once, each in its own rhythm, and check what they hear.
fn talk((client, server): (Peer, Peer), seed: u64) -> Result<()> {
    let (up, down) = (up(seed), down(seed));
    std::thread::scope(|scope| {
        let all = [
            ("send up", scope.spawn(|| send(&client, up))),
            ("receive up", scope.spawn(|| receive(&server, up))),
            ("send down", scope.spawn(|| send(&server, down))),
            ("receive down", scope.spawn(|| receive(&client, down))),
        ];
        for (what, end) in all {
            end.join().expect("an end does not panic").context(what)?;
        }
        Ok(())
    })
}

/// Sizes from nothing to several buffers, most of them small; pauses now and then.
fn send(peer: &Peer, seed: u64) -> Result<()> {
    let mut rhythm = Noise::new(!seed);
    let mut noise = Noise::new(seed);
    let mut left = length(seed);
    while left > 0 {
        let largest = 1 << rhythm.below(19);
        let piece = left.min(1 + rhythm.below(largest) as usize);
        peer.say_noise(&mut noise, piece)?;
        left -= piece;
        pause(&mut rhythm);
    }
    peer.finish()
}

fn receive(peer: &Peer, seed: u64) -> Result<()> {
    let mut rhythm = Noise::new(seed.rotate_left(32));
    let mut noise = Noise::new(seed);
    let mut left = length(seed);
    while left > 0 {
        let piece = left.min(1 + rhythm.below(200_000) as usize);
        peer.hear_noise(&mut noise, piece)?;
        left -= piece;
        pause(&mut rhythm);
    }
    peer.hear_end()
}

/// What goes up on a connection, by its seed.
fn up(seed: u64) -> u64 {
    2 * seed
}

/// What comes down on it.
fn down(seed: u64) -> u64 {
    2 * seed + 1
}

fn length(seed: u64) -> usize {
    Noise::new(seed.wrapping_mul(31)).below(800_000) as usize
}

/// The rhythm is what is tested: nothing waits for it.
fn pause(rhythm: &mut Noise) {
    if rhythm.below(8) == 0 {
        std::thread::sleep(Duration::from_micros(rhythm.below(2000)));
    }
}

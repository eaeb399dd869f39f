//! A server that can be killed: whoever comes names the seed of a conversation, is told the number of who answers,
//! and then has that conversation. Each is reported in a line on standard output.
//!
//! `conversing NUMBER IP:PORT [rude]`; one that is rude resets whoever comes.

use std::net::SocketAddr;
use std::thread::spawn;

use ambassador_tests::address::Address;
use ambassador_tests::conversation::Plan;
use ambassador_tests::noise::Noise;
use ambassador_tests::peer::Peer;
use anyhow::{Context, Result};

fn main() -> Result<()> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let number = words.first().context("give a number")?.parse()?;
    let address: SocketAddr = words.get(1).context("give an address")?.parse()?;
    let is_rude = words.get(2).is_some_and(|word| word == "rude");
    let listener = Address::from(address).listen()?;
    loop {
        // Nobody may come for long.
        let Ok(peer) = listener.accept() else { continue };
        if is_rude {
            peer.reset()?;
            continue;
        }
        spawn(move || {
            // Whoever only looks whether somebody is here says nothing.
            let Ok(seed) = begin(&peer, number) else { return };
            match Plan::of(&mut Noise::new(seed)).server.take_part(peer) {
                Ok(()) => println!("{seed} ok"),
                Err(error) => println!("{seed} {}", format!("{error:#}").replace('\n', " ")),
            }
        });
    }
}

fn begin(peer: &Peer, number: u16) -> Result<u64> {
    let seed = peer.hear(8)?;
    peer.say(&number.to_le_bytes())?;
    Ok(u64::from_le_bytes(seed.try_into().ok().context("read a seed")?))
}

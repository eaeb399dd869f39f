//! A server that can be killed: whoever comes names the seed of a conversation, is told the number of who answers,
//! and then has that conversation. Each is reported in a line on standard output.
//!
//! `conversing NUMBER IP:PORT [rude]`; one that is rude resets whoever comes. After SIGUSR1 it lets nobody in any
//! more, so that its accept queue, which is short then, is full; until SIGUSR2.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{sleep, spawn};
use std::time::Duration;

use ambassador_tests::address::Address;
use ambassador_tests::conversation::Plan;
use ambassador_tests::noise::Noise;
use ambassador_tests::peer::{Listener, Peer};
use anyhow::{Context, Result};

/// Whether nobody is let in.
static SHUT: AtomicBool = AtomicBool::new(false);
const PAUSE: Duration = Duration::from_millis(5);

fn main() -> Result<()> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let number = words.first().context("give a number")?.parse()?;
    let address: SocketAddr = words.get(1).context("give an address")?.parse()?;
    let is_rude = words.get(2).is_some_and(|word| word == "rude");
    obey_signals();
    let listener = Address::from(address).listen()?;
    loop {
        wait_while_shut(&listener)?;
        // Nobody may come for long, or a signal comes.
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

fn wait_while_shut(listener: &Listener) -> Result<()> {
    if SHUT.load(Ordering::Relaxed) {
        listener.socket().listen(0).context("make the accept queue short")?;
        while SHUT.load(Ordering::Relaxed) {
            sleep(PAUSE);
        }
        listener.socket().listen(4096).context("make the accept queue long")?;
    }
    Ok(())
}

fn obey_signals() {
    for signal in [libc::SIGUSR1, libc::SIGUSR2] {
        let handler = hear_signal as extern "C" fn(libc::c_int);
        // SAFETY: the handler does nothing but store a flag.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

extern "C" fn hear_signal(signal: libc::c_int) {
    SHUT.store(signal == libc::SIGUSR1, Ordering::Relaxed);
}

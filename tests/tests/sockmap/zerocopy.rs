//! MSG_ZEROCOPY on a socket that is in a sockmap when it asks for completions.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;

use ambassador::datapath::obstacle;
use ambassador::datapath::sockmap::Enrol;
use ambassador_tests::noise::Noise;
use ambassador_tests::peer::turn_on;
use ambassador_tests::skip;
use ambassador_tests::wait::until_true;
use anyhow::{Result, ensure};

use crate::tier::{Blocking, Tier};
use crate::{BYTES, limits};

/// SO_EE_ORIGIN_ZEROCOPY of include/uapi/linux/errqueue.h; the libc crate does not have it.
const ZEROCOPY: u8 = 5;

/// One too many would let it write into bytes that are still to be sent.
#[test]
fn client_that_wants_completions_gets_one_a_send_and_an_ordinary_socket_back() -> Result<()> {
    if let Err(obstacle) = obstacle::to_load() {
        skip!("{obstacle}");
    }
    let tier = Tier::new(Enrol::Unnoticed, limits(BYTES)?)?;
    let connection = tier.connect(Blocking::No)?;
    connection.until_latched()?;
    let shortcut = connection.shortcut()?;
    let carried = shortcut.carried();
    let client = connection.client.socket();
    turn_on(client, libc::SOL_SOCKET, libc::SO_ZEROCOPY)?;
    for seed in 0..10 {
        // The first is passed natively, in many pages, and the relay takes notice when it forwards it.
        let bytes = Noise::new(seed).bytes(150_000);
        let sent = client.send_with_flags(&bytes, libc::MSG_ZEROCOPY)?;
        ensure!(connection.server.hear(sent)? == bytes[..sent]);
        let mut completed = 0;
        until_true("a completion", || {
            completed += completions(client)?;
            Ok(completed > 0)
        })?;
        ensure!(completed == 1, "send {seed} was completed {completed} times");
    }
    ensure!(shortcut.carried() == carried, "its bytes took the shortcut");
    Ok(())
}

/// How many zero-copy sends a message of the error queue says to be completed; 0 if there is none.
fn completions(socket: &socket2::Socket) -> Result<u32> {
    let mut control = [0_u64; 16];
    // SAFETY: integers and pointers, for which zeros are values.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the message leads to room that outlives the call.
    let read = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_ERRQUEUE) };
    if read < 0 {
        let error = std::io::Error::last_os_error();
        ensure!(error.kind() == ErrorKind::WouldBlock, "read the error queue: {error}");
        return Ok(0);
    }
    // SAFETY: the kernel has filled in the message.
    let first = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    ensure!(!first.is_null(), "a message of the error queue says nothing");
    // SAFETY: the header is followed by its data.
    let data = unsafe { libc::CMSG_DATA(first) }.cast::<libc::sock_extended_err>();
    // SAFETY: on a TCP socket that data is such an error.
    let told = unsafe { data.read_unaligned() };
    ensure!(told.ee_origin == ZEROCOPY, "an error of another kind");
    // From the one to the other, both counted.
    Ok(told.ee_data - told.ee_info + 1)
}

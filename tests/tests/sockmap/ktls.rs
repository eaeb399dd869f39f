//! kTLS: what a client has its kernel encrypt, a program on its socket sees as it was before.
//!
//! Where it is not skipped it has passed on Linux 6.12.100, in a virtual machine with `gcm` and `tls` loaded.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use ambassador::datapath::obstacle;
use ambassador::datapath::sockmap::Enrol;
use ambassador_tests::address::Family;
use ambassador_tests::peer::Listener;
use ambassador_tests::skip;
use anyhow::{Context, Result, ensure};
use socket2::Socket;

use crate::tier::{Blocking, Tier};
use crate::{BYTES, limits};

const PLAIN: &[u8] = b"a secret";
/// Its header, explicit nonce and tag.
const RECORD: usize = 5 + 8 + PLAIN.len() + 16;

#[test]
fn what_a_client_encrypts_in_the_kernel_arrives_encrypted() -> Result<()> {
    let protocols = "/proc/sys/net/ipv4/tcp_available_ulp";
    let protocols = fs::read_to_string(protocols).with_context(|| format!("read {protocols}"))?;
    if !protocols.split_whitespace().any(|protocol| protocol == "tls") {
        skip!("this kernel has no kTLS, or its module `tls` is not loaded");
    }
    if let Err(obstacle) = obstacle::to_load() {
        skip!("{obstacle}");
    }
    let listener = Listener::new(Family::Tcp)?;
    let ordinary = listener.address().connect()?;
    if let Err(error) = encrypt(ordinary.socket()) {
        skip!("this kernel does not encrypt: {error}");
    }

    let tier = Tier::new(Enrol::Unnoticed, limits(BYTES)?)?;
    let connection = tier.connect(Blocking::No)?;
    connection.until_latched()?;
    let carried = connection.shortcut()?.carried();
    if let Err(error) = encrypt(connection.client.socket()) {
        // Some kernels keep the two apart: then the app encrypts, as where there is no kTLS.
        ensure!(
            error.raw_os_error() == Some(libc::EINVAL),
            "refused on an enrolled socket: {error}"
        );
        return connection.say_up(b"encrypted by the app");
    }
    for _ in 0..10 {
        connection.client.say(PLAIN)?;
        let record = connection.server.hear(RECORD)?;
        ensure!(record[..3] == [23, 3, 3], "no record of TLS 1.2 arrived: {record:?}");
        ensure!(!record.windows(PLAIN.len()).any(|window| window == PLAIN), "it can be read");
    }
    ensure!(connection.shortcut()?.carried() == carried, "bytes took the shortcut");
    Ok(())
}

/// Has the kernel encrypt what is sent, by TLS 1.2 with AES-GCM.
fn encrypt(socket: &Socket) -> io::Result<()> {
    set(socket, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls")?;
    let (version, cipher) = (0x0303_u16, 51_u16);
    // `struct tls12_crypto_info_aes_gcm_128`: after these two a nonce, the key, a salt and a number, all zeros.
    let mut secrets = [0; 40];
    secrets[..2].copy_from_slice(&version.to_ne_bytes());
    secrets[2..4].copy_from_slice(&cipher.to_ne_bytes());
    set(socket, libc::SOL_TLS, libc::TLS_TX, &secrets)
}

fn set(socket: &Socket, level: libc::c_int, name: libc::c_int, value: &[u8]) -> io::Result<()> {
    let length = value.len() as libc::socklen_t;
    // SAFETY: the pointer and the length describe `value`, which the kernel only reads.
    let failed =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

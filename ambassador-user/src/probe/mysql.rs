//! MySQL and MariaDB: the greeting, of protocol 10.
//!
//! A client that hears the greeting and goes is a failed handshake to the server, and after
//! `max_connect_errors` of these (100), with no login in between, it lets nobody in any more who comes from that
//! address: a check would lock out the app of its own Pod. A login that is refused is not counted so (only
//! handshake errors are, as the manual says of `host_cache`, and as MariaDB 10.11 does it), so the check goes
//! on to one, as [`USER`] without a password. Either costs one `Aborted_connects` and, in MariaDB, a line of
//! the log. Where there is such a user, without any privilege, it costs neither.
//! <https://dev.mysql.com/doc/dev/mysql-server/latest/page_protocol_connection_phase.html>

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncRead, AsyncWrite};

use super::dialogue::{Dialogue, words};

/// Who asks to be let in.
const USER: &[u8] = b"ambassador";
/// Longer than any packet that is waited for.
const LONGEST: usize = 4096;

/// The first byte of a packet.
const PROTOCOL_10: u8 = 10;
const OK: u8 = 0;
const ERR: u8 = 0xff;
const AUTH_SWITCH: u8 = 0xfe;

const CLIENT_PROTOCOL_41: u32 = 1 << 9;
const CLIENT_SECURE_CONNECTION: u32 = 1 << 15;
const CLIENT_PLUGIN_AUTH: u32 = 1 << 19;
const UTF8: u8 = 33;
const COM_QUIT: u8 = 1;

/// Errors that a server has for any user: it is full, or ends.
const TOO_MANY_CONNECTIONS: u16 = 1040;
const SERVER_SHUTDOWN: u16 = 1053;

struct Packet {
    sequence: u8,
    payload: bytes::BytesMut,
}

pub(super) async fn ask<S>(mut server: Dialogue<S>) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let greeting = server.packet().await?;
    match greeting.payload.first() {
        Some(&PROTOCOL_10) => {}
        Some(&ERR) => bail!("{}", greeting.error()?.1),
        _ => bail!("not a greeting of MySQL: {}", words(&greeting.payload)),
    }
    ensure!(
        greeting.payload.contains(&0),
        "the greeting does not end: {}",
        words(&greeting.payload)
    );

    let plugin = greeting.plugin();
    let capabilities = CLIENT_PROTOCOL_41
        | CLIENT_SECURE_CONNECTION
        | if plugin.is_some() { CLIENT_PLUGIN_AUTH } else { 0 };
    let mut login = capabilities.to_le_bytes().to_vec();
    login.extend_from_slice(&(LONGEST as u32).to_le_bytes());
    login.push(UTF8);
    login.extend_from_slice(&[0; 23]);
    login.extend_from_slice(USER);
    // The end of the user, and a password of no bytes.
    login.extend_from_slice(&[0, 0]);
    if let Some(plugin) = plugin {
        login.extend_from_slice(plugin);
        login.push(0);
    }
    server.reply(greeting.sequence, &login).await?;

    let mut answer = server.packet().await?;
    if answer.payload.first() == Some(&AUTH_SWITCH) {
        // Asked in another way, there is no password either.
        server.reply(answer.sequence, b"").await?;
        answer = server.packet().await?;
    }
    match answer.payload.first() {
        Some(&ERR) => match answer.error()? {
            (TOO_MANY_CONNECTIONS | SERVER_SHUTDOWN, error) => bail!("{error}"),
            _refused => Ok(()),
        },
        // A command begins a new sequence.
        Some(&OK) => server.say(&[1, 0, 0, 0, COM_QUIT]).await,
        _ => Ok(()),
    }
}

impl Packet {
    /// The number and the words of an error, which has an SQL state once there was a greeting.
    fn error(&self) -> Result<(u16, String)> {
        let [_, low, high, said @ ..] = &*self.payload else { bail!("an error without a number") };
        let number = u16::from_le_bytes([*low, *high]);
        let said = match said {
            [b'#', _, _, _, _, _, said @ ..] => said,
            said => said,
        };
        Ok((number, format!("{} ({number})", words(said))))
    }

    /// How a greeting says that it wants to be logged in to.
    fn plugin(&self) -> Option<&[u8]> {
        // Version of the protocol; version of the server, ended by 0; thread, 4 bytes; challenge, 8, and 0;
        // capabilities, 2; character set, 1; status, 2; capabilities, 2.
        let version = self.payload.iter().skip(1).position(|byte| *byte == 0)? + 2;
        let rest = self.payload.get(version + 4 + 9..)?;
        let capabilities =
            u32::from_le_bytes([*rest.first()?, *rest.get(1)?, *rest.get(5)?, *rest.get(6)?]);
        if capabilities & CLIENT_PLUGIN_AUTH == 0 {
            return None;
        }
        // Length of the whole challenge, 1 byte; reserved, 10; the rest of it, at least 13.
        let challenge = usize::from(*rest.get(7)?).saturating_sub(8).max(13);
        let plugin = rest.get(8 + 10 + challenge..)?;
        Some(plugin.split(|byte| *byte == 0).next().unwrap_or(plugin))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Dialogue<S> {
    async fn packet(&mut self) -> Result<Packet> {
        let header = self.peek(4).await?;
        let length =
            usize::from(header[0]) | usize::from(header[1]) << 8 | usize::from(header[2]) << 16;
        let sequence = header[3];
        ensure!((1..=LONGEST).contains(&length), "not a packet of MySQL: {}", words(self.heard()));
        let mut payload = self.take(4 + length).await?;
        Ok(Packet { sequence, payload: payload.split_off(4) })
    }

    async fn reply(&mut self, to: u8, payload: &[u8]) -> Result<()> {
        let length = u32::try_from(payload.len()).context("write a packet")?.to_le_bytes();
        let mut packet = vec![length[0], length[1], length[2], to.wrapping_add(1)];
        packet.extend_from_slice(payload);
        self.say(&packet).await
    }
}

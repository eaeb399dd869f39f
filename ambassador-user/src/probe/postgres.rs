//! PostgreSQL, and the poolers before it.
//!
//! Without a login it is asked whether it would encrypt by GSSAPI: any answer is one, and a server that is
//! then left says nothing in its log (asked for TLS, which it would rather begin, it logs each time that it
//! could not accept it). What it does not tell is whether the database takes sessions yet: that takes a user.

use anyhow::{Context, Result, bail, ensure};
use bytes::BytesMut;
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::backend::{DataRowBody, ErrorResponseBody, Header, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncWrite};

use super::dialogue::{Dialogue, words};
use super::password;
use crate::config::{PostgresLogin, Role};

/// GSSENCRequest: 8 bytes, 1234.5680.
const ENCRYPTS: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30];
/// Of a server before 12, to which this question is not known.
const NOT_KNOWN: &str = "0A000";
/// The longest message that is waited for.
const LONGEST: i32 = 8 << 10;
/// How often a password may have to be hashed: the default is 4,096, and a hostile server could ask for an hour.
const HASHED: u32 = 100_000;

pub(super) async fn greet<S>(mut server: Dialogue<S>) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    server.say(&ENCRYPTS).await?;
    match server.peek(1).await? {
        b"N" | b"G" => Ok(()),
        _ => match server.message().await? {
            Message::ErrorResponse(error) => match Refusal::read(&error)? {
                refusal if refusal.code == NOT_KNOWN => Ok(()),
                refusal => bail!(refusal.text),
            },
            _ => bail!("an answer to something else"),
        },
    }
}

pub(super) async fn log_in<S>(login: &PostgresLogin, mut server: Dialogue<S>) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let database = login.database.as_deref().map(|database| ("database", database));
    let who = [("user", &*login.user), ("application_name", "ambassador")];
    server.send(|out| frontend::startup_message(who.into_iter().chain(database), out)).await?;
    if server.enter(login).await? == Entry::Asked {
        ensure!(login.role.is_none(), "it asks for a password: give a password file");
        return Ok(());
    }
    if let Some(wanted) = login.role {
        let role = server.transaction_role().await?;
        ensure!(role == wanted, "it is a {role}, not a {wanted}");
    }
    // Else it would log that the connection was lost.
    let mut end = BytesMut::new();
    frontend::terminate(&mut end);
    server.say(&end).await
}

#[derive(PartialEq, Eq)]
enum Entry {
    /// It is ready for a question.
    Open,
    /// It asked for a password that nobody gave us.
    Asked,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Dialogue<S> {
    /// Gets in, as a server that has been told who comes wants it.
    async fn enter(&mut self, login: &PostgresLogin) -> Result<Entry> {
        loop {
            match self.message().await? {
                Message::ReadyForQuery(_) => return Ok(Entry::Open),
                Message::ErrorResponse(error) => bail!(Refusal::read(&error)?.text),
                Message::AuthenticationOk
                | Message::ParameterStatus(_)
                | Message::BackendKeyData(_)
                | Message::NoticeResponse(_) => {}
                challenge @ (Message::AuthenticationCleartextPassword
                | Message::AuthenticationMd5Password(_)
                | Message::AuthenticationSasl(_)
                | Message::AuthenticationGss
                | Message::AuthenticationSspi) => {
                    let Some(file) = &login.password_file else { return Ok(Entry::Asked) };
                    self.authenticate(&login.user, &password(file)?, challenge).await?;
                }
                _ => bail!("an answer to something else"),
            }
        }
    }

    async fn authenticate(
        &mut self,
        user: &str,
        password: &[u8],
        challenge: Message,
    ) -> Result<()> {
        match challenge {
            Message::AuthenticationMd5Password(body) => {
                let hash = md5_hash(user.as_bytes(), password, body.salt());
                self.send(|out| frontend::password_message(hash.as_bytes(), out)).await
            }
            Message::AuthenticationSasl(body) => {
                let mut mechanisms = body.mechanisms();
                let known = mechanisms.any(|mechanism| Ok(mechanism == sasl::SCRAM_SHA_256));
                ensure!(known.context("its logins")?, "it knows no login by SCRAM-SHA-256");
                self.scram(password).await
            }
            Message::AuthenticationCleartextPassword => {
                bail!("it wants the password in clear: let its pg_hba.conf say scram-sha-256")
            }
            _ => bail!("it wants no password, but Kerberos: let its pg_hba.conf say scram-sha-256"),
        }
    }

    async fn scram(&mut self, password: &[u8]) -> Result<()> {
        let binding = sasl::ChannelBinding::unsupported();
        let mut scram = sasl::ScramSha256::new(password, binding);
        self.send(|out| frontend::sasl_initial_response(sasl::SCRAM_SHA_256, scram.message(), out))
            .await?;
        let challenge = match self.message().await? {
            Message::AuthenticationSaslContinue(body) => body.data().to_vec(),
            Message::ErrorResponse(error) => bail!(Refusal::read(&error)?.text),
            _ => bail!("a login that breaks off"),
        };
        ensure!(
            hashed(&challenge).is_some_and(|times| times <= HASHED),
            "its password takes too long to hash"
        );
        // Some milliseconds of work, which would hold up everything else here.
        let hashing = tokio::task::spawn_blocking(move || scram.update(&challenge).map(|()| scram));
        let mut scram = hashing.await.context("hash the password")?.context("its challenge")?;
        self.send(|out| frontend::sasl_response(scram.message(), out)).await?;
        match self.message().await? {
            Message::AuthenticationSaslFinal(body) => {
                scram.finish(body.data()).context("it does not know the password itself")
            }
            Message::ErrorResponse(error) => bail!(Refusal::read(&error)?.text),
            _ => bail!("a login that breaks off"),
        }
    }

    /// Whether it takes writes. Unlike `pg_is_in_recovery()` this tells a database that is set to be read too.
    async fn transaction_role(&mut self) -> Result<Role> {
        self.send(|out| frontend::query("SHOW transaction_read_only", out)).await?;
        let mut role = None;
        loop {
            match self.message().await? {
                Message::DataRow(row) => role = Some(value(&row)?),
                Message::ErrorResponse(error) => bail!(Refusal::read(&error)?.text),
                Message::ReadyForQuery(_) => break,
                _ => {}
            }
        }
        match role.as_deref() {
            Some("on") => Ok(Role::Replica),
            Some("off") => Ok(Role::Primary),
            other => bail!("transaction_read_only is {}", other.unwrap_or("not told")),
        }
    }

    async fn send(
        &mut self,
        write: impl FnOnce(&mut BytesMut) -> std::io::Result<()>,
    ) -> Result<()> {
        let mut out = BytesMut::new();
        write(&mut out).context("write a message")?;
        self.say(&out).await
    }

    async fn message(&mut self) -> Result<Message> {
        let header = self.peek(5).await?;
        let possible =
            |it: &Header| it.tag().is_ascii_alphabetic() && (4..=LONGEST).contains(&it.len());
        let header = Header::parse(header).ok().flatten().filter(possible);
        let Some(header) = header else {
            bail!("not a message of PostgreSQL: {}", words(self.heard()));
        };
        // Only what is there in whole is parsed: else room is made for whatever length is claimed.
        let mut whole = self.take(1 + header.len() as usize).await?;
        Message::parse(&mut whole)
            .context("not a message of PostgreSQL")?
            .context("an empty message")
    }
}

/// How often a password is to be hashed, by the first answer of SCRAM: `r=NONCE,s=SALT,i=TIMES`.
fn hashed(challenge: &[u8]) -> Option<u32> {
    let mut parts = challenge.split(|byte| *byte == b',');
    let times = parts.find_map(|part| part.strip_prefix(b"i="))?;
    std::str::from_utf8(times).ok()?.parse().ok()
}

/// The one value of a row.
fn value(row: &DataRowBody) -> Result<String> {
    let range = row.ranges().next().context("its answer")?.flatten();
    Ok(words(range.and_then(|range| row.buffer().get(range)).unwrap_or_default()))
}

/// What an error of the server says.
struct Refusal {
    code: String,
    text: String,
}

impl Refusal {
    fn read(error: &ErrorResponseBody) -> Result<Self> {
        let (mut severity, mut code, mut message) = (String::new(), String::new(), String::new());
        let mut fields = error.fields();
        while let Some(field) = fields.next().context("an error that cannot be read")? {
            match field.type_() {
                b'S' => severity = words(field.value_bytes()),
                b'C' => code = words(field.value_bytes()),
                b'M' => message = words(field.value_bytes()),
                _ => {}
            }
        }
        Ok(Self { text: format!("{severity}: {message} ({code})"), code })
    }
}

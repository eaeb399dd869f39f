//! Redis, and what speaks its protocol: PONG to a PING, and the role it has.

use anyhow::{Result, bail, ensure};
use tokio::io::{AsyncRead, AsyncWrite};

use super::dialogue::{Dialogue, words};
use super::password;
use crate::config::{AskRedis, Role};

/// So much of a password in the words of a server gives it away.
const TELLING: usize = 4;

pub(super) async fn ask<S>(ask: &AskRedis, mut server: Dialogue<S>) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if let Some(login) = &ask.login {
        let password = password(&login.password_file)?;
        let mut auth = vec![&b"AUTH"[..]];
        auth.extend(login.user.as_deref().map(str::as_bytes));
        auth.push(&password);
        let answer = server.order(&auth).await?;
        if answer != "+OK" {
            // One that does not know AUTH repeats what it was given, whole or in part.
            let telling = String::from_utf8_lossy(&password[..password.len().min(TELLING)]);
            ensure!(
                !answer.contains(&*telling),
                "the password was refused, in words that repeat it"
            );
            bail!("{answer}");
        }
    }
    match &*server.order(&[b"PING"]).await? {
        "+PONG" => {}
        refusal if refusal.starts_with("-NOAUTH") => bail!("{refusal} Give a password file."),
        // Such as -LOADING and -MASTERDOWN.
        answer => bail!("{answer}"),
    }
    if let Some(wanted) = ask.role {
        let role = server.replication_role().await?;
        let is = match &*role {
            "master" => Some(Role::Primary),
            "slave" => Some(Role::Replica),
            _ => None,
        };
        ensure!(is == Some(wanted), "its role is {role}, not that of a {wanted}");
    }
    Ok(())
}

impl<S: AsyncRead + AsyncWrite + Unpin> Dialogue<S> {
    /// Gives a command, and hears the first line of the answer.
    async fn order(&mut self, command: &[&[u8]]) -> Result<String> {
        let mut order = format!("*{}\r\n", command.len()).into_bytes();
        for word in command {
            order.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            order.extend_from_slice(word);
            order.extend_from_slice(b"\r\n");
        }
        self.say(&order).await?;
        self.answer().await
    }

    async fn answer(&mut self) -> Result<String> {
        Ok(words(&self.line().await?))
    }

    /// Its role in its own words. What else the answer says is left unread.
    async fn replication_role(&mut self) -> Result<String> {
        let answer = self.order(&[b"ROLE"]).await?;
        if answer.starts_with('*') {
            self.answer().await?;
            return self.answer().await;
        }
        // ROLE is not known everywhere, or not permitted.
        let answer = self.order(&[b"INFO", b"replication"]).await?;
        ensure!(answer.starts_with('$'), "its role cannot be asked for: {answer}");
        loop {
            if let Some(role) = self.answer().await?.strip_prefix("role:") {
                return Ok(role.to_owned());
            }
        }
    }
}

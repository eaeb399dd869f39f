//! A pool of connections as an app has one: each member asks again and again, and checks what is answered. One whose
//! connection fails connects anew at once; none waits longer than its patience.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Socket, Type};

use crate::peer::Peer;
use crate::wait::until_true;

/// Between two calls of a member, unless the first has failed and the one before it has not.
const PACE: Duration = Duration::from_millis(2);

/// What is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Redis.
    Redis,
    /// PostgreSQL, as the user `postgres` without a password.
    Postgres,
}

/// A running pool; ends when dropped.
#[derive(Debug)]
pub struct Pool {
    stop: Arc<AtomicBool>,
    /// Of each member, the port of the server that has answered its last call; 0 if none has.
    served_by: Arc<[AtomicU16]>,
    members: Vec<JoinHandle<Result<Vec<Call>>>>,
}

/// One thing that an app wanted to know.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Whose call.
    pub member: usize,
    /// When it was over.
    pub ended: Instant,
    /// How.
    pub end: End,
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By the right answer, of the server that listens on this port.
    Answered(u16),
    /// The connection failed, or nothing came in time.
    Failed,
    /// There was no connection to be had for it.
    NotConnected,
}

impl Pool {
    /// So many members that connect to this address, where the calling thread runs.
    pub fn start(
        address: SocketAddr,
        dialect: Dialect,
        members: usize,
        patience: Duration,
    ) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let served_by: Arc<[AtomicU16]> = (0..members).map(|_| AtomicU16::new(0)).collect();
        let members = (0..members).map(|number| {
            let (stop, served_by) = (Arc::clone(&stop), Arc::clone(&served_by));
            let mut member = Member { number, address, dialect, patience, connection: None };
            thread::spawn(move || member.call_until(&stop, &served_by[number]))
        });
        let members = members.collect();
        Self { stop, served_by, members }
    }

    /// Waits until the server on this port has answered the last call of every member.
    pub fn until_served_by(&mut self, port: u16) -> Result<()> {
        until_true(&format!("answers from port {port} for all"), || {
            if let Some(ended) = self.members.iter().position(JoinHandle::is_finished) {
                joined(self.members.swap_remove(ended))?;
                bail!("a member has ended");
            }
            Ok(self.served_by.iter().all(|it| it.load(Ordering::Relaxed) == port))
        })
        .with_context(|| format!("served by {:?}", self.served_by))
    }

    /// Ends it, and says what became of all calls. An error if there was a wrong answer.
    pub fn end(mut self) -> Result<Vec<Call>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut calls = Vec::new();
        for member in std::mem::take(&mut self.members) {
            calls.extend(joined(member)?);
        }
        Ok(calls)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn joined(member: JoinHandle<Result<Vec<Call>>>) -> Result<Vec<Call>> {
    member.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

struct Member {
    number: usize,
    address: SocketAddr,
    dialect: Dialect,
    patience: Duration,
    connection: Option<Peer>,
}

impl Member {
    fn call_until(&mut self, stop: &AtomicBool, served_by: &AtomicU16) -> Result<Vec<Call>> {
        let mut calls: Vec<Call> = Vec::new();
        let mut failed_before = false;
        while !stop.load(Ordering::Relaxed) {
            // No two questions of a pool are alike.
            let end = self.call((calls.len() << 16 | self.number) as u64)?;
            calls.push(Call { member: self.number, ended: Instant::now(), end });
            let port = if let End::Answered(port) = end { port } else { 0 };
            served_by.store(port, Ordering::Relaxed);
            if port != 0 || failed_before {
                thread::sleep(PACE);
            }
            failed_before = port == 0;
        }
        Ok(calls)
    }

    /// Asks once; a wrong answer is an error.
    fn call(&mut self, number: u64) -> Result<End> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => match self.connect() {
                Ok(connection) => connection,
                Err(_) => return Ok(End::NotConnected),
            },
        };
        let said = connection.say(&self.dialect.question(number));
        let Ok(answer) = said.and_then(|()| self.dialect.hear(&connection)) else {
            return Ok(End::Failed);
        };
        let port = self.dialect.server_of(&answer, number);
        let port = port.with_context(|| format!("{number} brought {}", answer.escape_ascii()))?;
        self.connection = Some(connection);
        Ok(End::Answered(port))
    }

    fn connect(&self) -> Result<Peer> {
        let socket = Socket::new(Domain::for_address(self.address), Type::STREAM, None)?;
        socket.connect_timeout(&self.address.into(), self.patience)?;
        socket.set_nonblocking(true)?;
        let connection = Peer::of(socket)?;
        connection.socket().set_read_timeout(Some(self.patience))?;
        if self.dialect == Dialect::Postgres {
            connection.say(b"\0\0\0\x17\0\x03\0\0user\0postgres\0\0")?;
            self.dialect.hear(&connection)?;
        }
        Ok(connection)
    }
}

impl Dialect {
    /// Which server it is, and this number.
    fn question(self, number: u64) -> Vec<u8> {
        match self {
            Self::Redis => format!("ECHO {number:020}\r\nCONFIG GET port\r\n").into_bytes(),
            Self::Postgres => {
                let query = format!("SELECT '{number:020}', inet_server_port()\0");
                let length = (4 + query.len()) as u32;
                [b"Q", &length.to_be_bytes()[..], query.as_bytes()].concat()
            }
        }
    }

    /// All that is said to one question.
    fn hear(self, connection: &Peer) -> Result<Vec<u8>> {
        if self == Self::Redis {
            let (before, between, after) = REDIS;
            return connection.hear(before.len() + between.len() + after.len() + DIGITS);
        }
        let mut answer = Vec::new();
        loop {
            let head = connection.hear(5)?;
            let length = u32::from_be_bytes(head[1..].try_into().context("read a length")?);
            let body = connection.hear((length as usize).saturating_sub(4))?;
            ensure!(head[0] != b'E', "it says {}", body.escape_ascii());
            match head[0] {
                // Ready for the next one.
                b'Z' => return Ok(answer),
                // A row.
                b'D' => answer.extend(body),
                _ => {}
            }
        }
    }

    /// The port of whoever said this, if it is the answer to the question of this number.
    fn server_of(self, answer: &[u8], number: u64) -> Result<u16> {
        let (before, between, after) = match self {
            Self::Redis => REDIS,
            // Two columns, each with its length.
            Self::Postgres => ("\0\x02\0\0\0\x14", "\0\0\0\x05", ""),
        };
        let answer = std::str::from_utf8(answer).context("it is no text")?;
        let start = format!("{before}{number:020}{between}");
        let rest = answer.strip_prefix(&start).context("another question's answer")?;
        let port = rest.strip_suffix(after).context("it goes on")?;
        port.parse().context("parse the port")
    }
}

/// What Redis says around a number and a port.
const REDIS: (&str, &str, &str) = ("$20\r\n", "\r\n*2\r\n$4\r\nport\r\n$5\r\n", "\r\n");
/// Of numbers and of ports, which in tests are above 9999.
const DIGITS: usize = 20 + 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_to_another_question_is_wrong() {
        let (before, between, after) = REDIS;
        let answer = format!("{before}00000000000000000007{between}12345{after}");
        let of = |number| Dialect::Redis.server_of(answer.as_bytes(), number);
        assert_eq!(of(7).ok(), Some(12345));
        assert!(of(8).is_err());
    }
}

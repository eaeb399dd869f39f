//! What a client can notice that `sockmap` serves whatever it is like: facts of this kernel. They are why `auto`
//! leaves blocking clients, and those of MSG_ZEROCOPY, alone.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::PollFlags;
use socket2::{SockRef, Socket};

use super::sockmap::{Bench, Connection, LOCALHOST, PIECE, polled, want_completions};
use super::{Fact, listen};
use crate::datapath::sockmap::{Enrol, is_diverted};

/// Whoever is woken again and again for so long, and still waits, goes on waiting.
const WOKEN: Duration = Duration::from_millis(100);

type Question = fn(&Bench) -> Result<bool>;

impl Bench {
    pub(super) fn facts(&self) -> Vec<Fact> {
        let questions: [(&str, Question); 3] = [
            ("FIONREAD counts what waits for a client", Self::counts_waiting_bytes),
            ("a blocking read waits until there is something", Self::blocking_read_lasts),
            ("MSG_ZEROCOPY is completed", Self::completes_zero_copy),
        ];
        let fact = |(name, ask): (_, Question)| {
            // What is to be tried after it matters more.
            let holds = if self.clock.left() > 3 * WOKEN {
                ask(self).map_err(|error| format!("{error:#}"))
            } else {
                Err("there was no time left to ask".to_owned())
            };
            Fact { name, holds }
        };
        questions.into_iter().map(fact).collect()
    }

    /// Whether a blocking read goes on waiting when something else wakes it: here, room for what another thread sends.
    fn blocking_read_lasts(&self) -> Result<bool> {
        let connection = self.whoever_it_is(self.stream()?)?;
        let Connection { client, mut accepted, .. } = connection;
        accepted.set_nonblocking(true)?;
        thread::scope(|scope| {
            let reader = scope.spawn(|| (&client).read(&mut [0]));
            let begun = Instant::now();
            while !reader.is_finished() && begun.elapsed() < WOKEN {
                let piece = [0; PIECE];
                let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                while SockRef::from(&client).send_with_flags(&piece, flags).is_ok() {}
                while accepted.read(&mut [0; PIECE]).is_ok_and(|read| read > 0) {}
            }
            accepted.write_all(b"x")?;
            match reader.join() {
                Ok(Ok(1)) => Ok(true),
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => Ok(false),
                other => bail!("the read ended with {other:?}"),
            }
        })
    }

    /// Whether an app is told when it may write again into what it has sent without a copy.
    fn completes_zero_copy(&self) -> Result<bool> {
        let client = self.stream()?;
        client.set_nonblocking(true)?;
        want_completions(&client)?;
        let mut connection = self.whoever_it_is(client)?;
        let shortcut = self.open(&connection)?;
        let client = &connection.client;
        let sent = SockRef::from(client).send_with_flags(b"straight", libc::MSG_ZEROCOPY);
        sent.context("send with MSG_ZEROCOPY")?;
        connection.server.read_exact(&mut [0; 8]).context("nothing arrived")?;
        ensure!(shortcut.carried() == 8, "it did not take the shortcut");
        self.clock.wait("what arrived is not acknowledged", || {
            Ok((shortcut.in_flight() == 0).then_some(()))
        })?;
        // Only completions make it an error.
        Ok(polled(client)?.contains(PollFlags::ERR))
    }

    /// A client that is enrolled without being looked at.
    fn whoever_it_is(&self, client: Socket) -> Result<Connection> {
        let listener = listen(LOCALHOST)?;
        self.sockmap.enrol(listener.local_addr()?, Enrol::Anybody)?;
        let connection = self.connect_from(client, &listener)?;
        ensure!(is_diverted(connection.client.as_fd()), "its socket was not enrolled");
        Ok(connection)
    }
}

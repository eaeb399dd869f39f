//! What a connection of the `sockmap` tier is owed when the relay is beside the shortcut, as in service: the
//! client's bytes may take either way at any time.

use std::future::pending;
use std::io::{ErrorKind, Write};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::yield_now;
use tokio::time::timeout;

use super::bytes::Bytes;
use super::reset;
use super::sockmap::{Bench, Connection, waiting, within_budget};
use crate::proxy::relay::{Traffic, relay};
use crate::proxy::shortcut::Shortcut;
use crate::proxy::socket::{Family, Socket};

/// Nobody needs more to come to a halt.
const MOST_HELD: u64 = 64 * 1024 * 1024;
/// Many times the budget.
const FEW: u64 = 1024 * 1024;
const READ: usize = 64 * 1024;

/// The two ends of a connection, and what carries beside the relay.
struct Ends {
    client: TcpStream,
    server: TcpStream,
    shortcut: Arc<dyn Shortcut>,
}

impl Bench {
    pub(super) fn server_may_speak_first(&self) -> Result<()> {
        self.relayed(self.enrolled()?, async |Ends { mut client, mut server, shortcut }| {
            server.write_all(b"greeting").await?;
            expect(&mut client, b"greeting").await?;
            client.write_all(b"answer").await?;
            expect(&mut server, b"answer").await?;
            ensure!(shortcut.carried() == 6, "it did not take the shortcut");
            Ok(())
        })
    }

    pub(super) fn early_bytes_stay_the_first(&self) -> Result<()> {
        let connection = self.connect(true)?;
        (&connection.client).write_all(b"early")?;
        let shortcut = self.open(&connection)?;
        self.relayed((connection, shortcut), async |Ends { mut client, mut server, shortcut }| {
            client.write_all(b", ").await?;
            expect(&mut server, b"early, ").await?;
            let before = shortcut.carried();
            client.write_all(b"late").await?;
            expect(&mut server, b"late").await?;
            ensure!(shortcut.carried() == before + 4, "later ones did not take the shortcut");
            Ok(())
        })
    }

    pub(super) fn each_side_may_end_its_half(&self) -> Result<()> {
        self.relayed(self.enrolled()?, async |Ends { mut client, mut server, .. }| {
            client.write_all(b"question").await?;
            client.shutdown().await?;
            expect_end(&mut server, b"question").await.context("the client ended first")?;
            server.write_all(b"answer").await?;
            server.shutdown().await?;
            expect_end(&mut client, b"answer").await.context("the client ended first")
        })?;
        self.relayed(self.enrolled()?, async |Ends { mut client, mut server, .. }| {
            server.write_all(b"greeting").await?;
            server.shutdown().await?;
            expect_end(&mut client, b"greeting").await.context("the server ended first")?;
            client.write_all(b"farewell").await?;
            client.shutdown().await?;
            expect_end(&mut server, b"farewell").await.context("the server ended first")
        })
    }

    pub(super) fn each_side_may_reset(&self) -> Result<()> {
        self.relayed(self.enrolled()?, async |Ends { mut client, mut server, .. }| {
            client.write_all(b"part").await?;
            expect(&mut server, b"part").await?;
            reset(client)?;
            expect_reset(&mut server).await.context("the client's")
        })?;
        self.relayed(self.enrolled()?, async |Ends { mut client, mut server, .. }| {
            client.write_all(b"question").await?;
            expect(&mut server, b"question").await?;
            reset(server)?;
            expect_reset(&mut client).await.context("the server's")
        })
    }

    /// The client is told by an edge only, as the runtime asks for.
    pub(super) fn stopped_writer_goes_on(&self) -> Result<()> {
        let (connection, shortcut) = self.enrolled()?;
        let mut sent = Bytes::new();
        loop {
            match (&connection.client).write(sent.piece()) {
                Ok(taken) => sent.position += taken as u64,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
            ensure!(sent.position < MOST_HELD, "nobody read, and {MOST_HELD} bytes were taken");
        }
        within_budget(&*shortcut, waiting(&connection.server)?)?;
        self.relayed((connection, shortcut), async |Ends { mut client, mut server, .. }| {
            let all = sent.position + FEW;
            let writing = send_while(|sent| sent < all, &mut client, &mut sent);
            let ((), received) = tokio::try_join!(writing, receive_to_end(&mut server))?;
            ensure!(received == sent.position, "{received} of {} bytes arrived", sent.position);
            Ok(())
        })
    }

    pub(super) fn slow_reader_holds_back(&self) -> Result<()> {
        self.relayed(self.enrolled()?, async |Ends { mut client, mut server, shortcut }| {
            let mut sent = Bytes::new();
            let writing = send_while(|sent| sent < FEW, &mut client, &mut sent);
            let reading = async {
                let (mut received, mut buffer) = (Bytes::new(), vec![0; READ / 16]);
                while received.position < FEW {
                    // The others get some turns for each of its own.
                    for _ in 0..4 {
                        yield_now().await;
                    }
                    within_budget(&*shortcut, received.position + waiting(&server)?)?;
                    let taken = server.read(&mut buffer).await?;
                    ensure!(taken > 0, "it ended after {} bytes", received.position);
                    received.take(&buffer[..taken])?;
                }
                Ok(())
            };
            tokio::try_join!(writing, reading)?;
            Ok(())
        })
    }

    pub(super) fn many_bytes_arrive(&self) -> Result<()> {
        // Others come after it.
        let enough = Instant::now() + self.clock.left() / 3;
        self.relayed(self.enrolled()?, async |Ends { mut client, mut server, shortcut }| {
            let mut sent = Bytes::new();
            let more = |sent| sent < self.bytes && Instant::now() < enough;
            let writing = send_while(more, &mut client, &mut sent);
            let ((), received) = tokio::try_join!(writing, receive_to_end(&mut server))?;
            ensure!(received == sent.position, "{received} of {} bytes arrived", sent.position);
            ensure!(sent.position > 0, "there was no time left to send any");
            ensure!(shortcut.carried() > 0, "nothing took the shortcut");
            Ok(())
        })
    }

    /// Does something with a connection while the relay serves it.
    fn relayed(
        &self,
        (connection, shortcut): (Connection, Arc<dyn Shortcut>),
        script: impl AsyncFnOnce(Ends) -> Result<()>,
    ) -> Result<()> {
        let Connection { client, accepted, ours, server, .. } = connection;
        self.runtime.block_on(async {
            let (accepted, ours) = (registered(accepted.into())?, registered(ours)?);
            let traffic = Traffic::default();
            // Set once, here.
            let _ = traffic.shortcut.set(Arc::clone(&shortcut));
            let relaying = async move {
                let pipes = Arc::default();
                let ended = relay(&accepted, &ours, Some(&pipes), None, &traffic, None).await;
                if ended.is_err() {
                    accepted.reset();
                    ours.reset();
                }
            };
            let relaying = async {
                relaying.await;
                pending().await
            };
            server.set_nonblocking(true)?;
            let (client, server) = (TcpStream::from_std(client)?, TcpStream::from_std(server)?);
            let ends = Ends { client, server, shortcut };
            tokio::select! {
                ended = timeout(self.clock.left(), script(ends)) => ended.context("it did not come to its end in time")?,
                never = relaying => never,
            }
        })
    }
}

fn registered(socket: socket2::Socket) -> Result<Socket> {
    socket.set_nonblocking(true)?;
    Socket::new(socket, Family::Tcp).context("register a socket")
}

/// Sends what comes next, then the end.
async fn send_while(
    more: impl Fn(u64) -> bool,
    client: &mut TcpStream,
    sent: &mut Bytes,
) -> Result<()> {
    while more(sent.position) {
        let taken = client.write(sent.piece()).await?;
        sent.position += taken as u64;
    }
    client.shutdown().await.context("end")
}

async fn receive_to_end(server: &mut TcpStream) -> Result<u64> {
    let (mut received, mut buffer) = (Bytes::new(), vec![0; READ]);
    loop {
        match server.read(&mut buffer).await? {
            0 => return Ok(received.position),
            taken => received.take(&buffer[..taken])?,
        }
    }
}

async fn expect(stream: &mut TcpStream, expected: &[u8]) -> Result<()> {
    let mut heard = vec![0; expected.len()];
    stream.read_exact(&mut heard).await?;
    ensure!(heard == expected, "other bytes arrived");
    Ok(())
}

async fn expect_end(stream: &mut TcpStream, expected: &[u8]) -> Result<()> {
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).await?;
    ensure!(
        heard == expected,
        "{} bytes arrived before the end, {} were sent",
        heard.len(),
        expected.len()
    );
    Ok(())
}

async fn expect_reset(stream: &mut TcpStream) -> Result<()> {
    match stream.read(&mut [0]).await {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(()),
        other => bail!("it is heard as {other:?}"),
    }
}

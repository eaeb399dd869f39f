//! A server that greets and then returns what it hears, on a thread of its own.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{JoinHandle, spawn};

use anyhow::{Context, Result};
use socket2::Socket;

use crate::address::{Address, Family};
use crate::peer::Listener;

/// A running echo server; it stops listening when dropped.
#[derive(Debug)]
pub struct Echo {
    listener: Arc<Listener>,
    accepted: Arc<AtomicUsize>,
    acceptor: Option<JoinHandle<()>>,
}

impl Echo {
    /// On an address of this family that nobody else uses, without a greeting.
    pub fn new(family: Family) -> Result<Self> {
        Ok(Self::on(Listener::new(family)?, ""))
    }

    /// On TCP, greeting everybody, so that a client knows which server it has reached.
    pub fn greeting(greeting: &'static str) -> Result<Self> {
        Ok(Self::on(Listener::new(Family::Tcp)?, greeting))
    }

    /// On a listener that is there already.
    pub fn on(listener: Listener, greeting: &'static str) -> Self {
        let listener = Arc::new(listener);
        let accepted = Arc::new(AtomicUsize::new(0));
        let acceptor = spawn({
            let (listener, accepted) = (Arc::clone(&listener), Arc::clone(&accepted));
            move || accept(listener.socket(), greeting, &accepted)
        });
        Self { listener, accepted, acceptor: Some(acceptor) }
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        self.listener.address()
    }

    /// How many clients it has accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // On a listening socket this wakes accept(2) for good; it cannot fail on one.
        let _ = self.listener.socket().shutdown(Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            // It ends on the error that the shutdown makes, and has nothing to report.
            let _ = acceptor.join();
        }
    }
}

fn accept(listener: &Socket, greeting: &'static str, accepted: &AtomicUsize) {
    loop {
        match listener.accept() {
            Ok((client, _)) => {
                accepted.fetch_add(1, Ordering::SeqCst);
                // Ends with its client; a client that fails is not the server's business.
                spawn(move || serve(&client, greeting));
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return,
        }
    }
}

fn serve(mut client: &Socket, greeting: &str) -> io::Result<()> {
    client.write_all(greeting.as_bytes())?;
    let mut chunk = [0; 16 * 1024];
    loop {
        match client.read(&mut chunk)? {
            0 => return client.shutdown(Shutdown::Write),
            read => client.write_all(&chunk[..read])?,
        }
    }
}

/// Connects to `address` and returns the greeting there, of a known length, and the connection.
pub fn greeted(address: &Address, length: usize) -> Result<(String, crate::peer::Peer)> {
    let client = address.connect()?;
    let greeting = client.hear(length).context("hear the greeting")?;
    Ok((String::from_utf8_lossy(&greeting).into_owned(), client))
}

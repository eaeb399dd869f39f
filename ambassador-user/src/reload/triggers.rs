//! Everything that can have the configuration read again. Triggers that come together are one.

use std::path::PathBuf;

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use super::watch::Watch;
use super::{Outcome, Refusal};

/// So many may be waiting for an answer at a time.
const MOST_WAITING: usize = 64;

/// Asks for a reload, and is told what came of it.
pub type Ask = mpsc::Sender<oneshot::Sender<Outcome>>;

/// SIGHUP, the control socket, and the file.
pub struct Triggers {
    hangup: Signal,
    asked: mpsc::Receiver<oneshot::Sender<Outcome>>,
    watch: Option<Watch>,
}

impl Triggers {
    /// Those of this process, with the file to watch if there is one.
    pub fn new(file: Option<PathBuf>) -> Result<(Self, Ask)> {
        let (ask, asked) = mpsc::channel(MOST_WAITING);
        let hangup = signal(SignalKind::hangup()).context("watch for SIGHUP")?;
        Ok((Self { hangup, asked, watch: file.map(Watch::new) }, ask))
    }

    /// Resolves when it is time, with those who wait for an answer.
    pub async fn next(&mut self) -> Vec<oneshot::Sender<Outcome>> {
        let mut asking = Vec::new();
        let file = async {
            match &mut self.watch {
                Some(watch) => watch.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.hangup.recv() => {}
            Some(ask) = self.asked.recv() => asking.push(ask),
            () = file => {}
        }
        while let Ok(ask) = self.asked.try_recv() {
            asking.push(ask);
        }
        // Before the file is read: what changes from now on is another reason.
        self.watch.iter_mut().for_each(Watch::look);
        asking
    }

    /// Answers whoever asks while there is nothing to reload any more.
    pub async fn refuse(mut self) {
        loop {
            let refusal = Refusal::draining();
            let asking = self.next().await;
            warn!("not reloaded: {}", refusal.why);
            for ask in asking {
                let _ = ask.send(Outcome::Refused(refusal.clone()));
            }
        }
    }
}

//! What the programs say, passed on to the log of this process.
//!
//! They say it by a ring that only whoever loaded them can open; a process that took them over hears
//! nothing.

use std::io;

use anyhow::{Context, Result};
use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The map that messages come by, as aya names it.
pub const MAP: &str = "AYA_LOGS";

/// The ring of messages.
pub struct Messages(EbpfLogger<&'static dyn log::Log>);

impl Messages {
    /// Those of a loaded object.
    pub fn of(kernel: &mut Ebpf) -> Result<Self> {
        EbpfLogger::init(kernel).map(Self).context("open the ring of messages")
    }

    /// Passes them on until the runtime ends.
    pub async fn pass_on(self) -> io::Result<()> {
        // SAFETY: the logger owns its descriptor and shows the same one for as long as it lives.
        let ring = unsafe { AsyncFd::register_with_interest(self.0, Interest::READABLE) };
        let mut ring = ring.map_err(io::Error::from)?;
        loop {
            let mut guard = ring.readable_mut().await?;
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    }
}

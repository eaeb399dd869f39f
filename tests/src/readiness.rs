//! What an event loop sees of a socket: when it can be read or written, level- or edge-triggered.

use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use socket2::Socket;

/// An epoll set of one socket.
#[derive(Debug)]
pub struct Readiness {
    epoll: OwnedFd,
}

impl Readiness {
    /// Watches for what is `wanted` of a socket from now on.
    pub fn of(socket: &Socket, wanted: EventFlags) -> Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC).context("create an epoll set")?;
        epoll::add(&epoll, socket, EventData::new_u64(0), wanted).context("watch a socket")?;
        Ok(Self { epoll })
    }

    /// What the socket is ready for, as soon as it is for anything; `None` if that takes too long.
    pub fn within(&self, time: Duration) -> Result<Option<EventFlags>> {
        let time = Timespec::try_from(time).context("turn a duration into a timespec")?;
        let mut events = [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }];
        // Some tests signal each other's threads.
        let wait = || epoll::wait(&self.epoll, &mut events, Some(&time));
        let count = rustix::io::retry_on_intr(wait).context("wait for events")?;
        Ok((count > 0).then_some(events[0].flags))
    }
}

//! Apps that have one conversation after another, each on whatever server it gets.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{Scope, ScopedJoinHandle, sleep};
use std::time::{Duration, Instant};

use ambassador_tests::address::Address;
use ambassador_tests::conversation::Plan;
use ambassador_tests::noise::Noise;
use ambassador_tests::place::Place;
use ambassador_tests::wait::until;
use ambassador_tests::way::Way;
use anyhow::{Context, Result};

use crate::scene::Scene;
use crate::verdict::LONGEST;

/// As many of each ambassador at a time.
const AT_ONCE: usize = 4;
const PAUSE: Duration = Duration::from_millis(20);

/// What callers shall do.
const CALL: usize = 0;
const WAIT: usize = 1;
const STOP: usize = 2;

/// All callers.
pub(crate) struct Callers {
    lines: Vec<Line>,
    order: AtomicUsize,
    talking: AtomicUsize,
}

/// To an ambassador.
struct Line {
    post: usize,
    way: Way,
    place: Place,
    route: Address,
}

/// One conversation, as its caller saw it.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) seed: u64,
    pub(crate) post: usize,
    pub(crate) way: Way,
    /// Who answered.
    pub(crate) server: Option<usize>,
    /// Its own address, once it was connected.
    pub(crate) from: Option<SocketAddr>,
    pub(crate) time: (Instant, Instant),
    pub(crate) bytes: usize,
    pub(crate) outcome: Result<()>,
}

impl Callers {
    pub(crate) fn new(scene: &Scene) -> Self {
        let posts = scene.posts();
        let lines = posts.iter().enumerate().map(|(post, it)| Line {
            post,
            way: it.way,
            place: it.place.clone(),
            route: it.theme.route.clone(),
        });
        let (order, talking) = (AtomicUsize::new(CALL), AtomicUsize::new(0));
        Self { lines: lines.collect(), order, talking }
    }

    /// Starts them; each returns what it had, once it is stopped.
    pub(crate) fn start<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        noise: &mut Noise,
    ) -> Vec<ScopedJoinHandle<'s, Vec<Call>>> {
        let lines = self.lines.iter().flat_map(|line| (0..AT_ONCE).map(move |_| line));
        let start = |line: &'s Line| {
            let mut noise = Noise::new(noise.below(u64::MAX));
            scope.spawn(move || {
                let calls = line.place.enter(|| Ok(self.call_again_and_again(line, &mut noise)));
                calls.expect("enter the pod")
            })
        };
        lines.map(start).collect()
    }

    /// Does something while nobody calls.
    pub(crate) fn pause<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        self.order.store(WAIT, Ordering::SeqCst);
        until("the end of all conversations", LONGEST, || {
            Ok((self.talking.load(Ordering::SeqCst) == 0).then_some(()))
        })?;
        let done = act();
        self.order.store(CALL, Ordering::SeqCst);
        done
    }

    pub(crate) fn stop(&self) {
        self.order.store(STOP, Ordering::SeqCst);
    }

    fn call_again_and_again(&self, line: &Line, noise: &mut Noise) -> Vec<Call> {
        let mut calls = Vec::new();
        loop {
            self.talking.fetch_add(1, Ordering::SeqCst);
            // Looked at only now, so that whoever gives an order sees who has not seen it.
            let order = self.order.load(Ordering::SeqCst);
            let call = (order == CALL).then(|| line.call(noise.below(u64::MAX)));
            self.talking.fetch_sub(1, Ordering::SeqCst);
            if order == STOP {
                return calls;
            }
            // As apps do that were refused.
            if call.as_ref().is_none_or(|call| call.outcome.is_err()) {
                sleep(PAUSE);
            }
            calls.extend(call);
        }
    }
}

impl Call {
    /// Whether its own socket led to the server, and not to the loopback.
    pub(crate) fn is_direct(&self) -> bool {
        self.from.is_some_and(|from| !from.ip().is_loopback())
    }
}

impl Line {
    fn call(&self, seed: u64) -> Call {
        let plan = Plan::of(&mut Noise::new(seed));
        let bytes = plan.client.bytes();
        let (mut server, mut from) = (None, None);
        let began = Instant::now();
        let talk = || -> Result<()> {
            let peer = self.route.connect()?;
            if self.way == Way::Sockmap {
                peer.socket().set_nonblocking(true).context("make a client non-blocking")?;
            }
            from = peer.socket().local_addr()?.as_socket();
            peer.say(&seed.to_le_bytes())?;
            let answer = peer.hear(2)?;
            server = Some(usize::from(u16::from_le_bytes([answer[0], answer[1]])));
            plan.client.take_part(peer)
        };
        let outcome = talk();
        let (post, way, time) = (self.post, self.way, (began, Instant::now()));
        Call { seed, post, way, server, from, time, bytes, outcome }
    }
}

//! What excuses a conversation that failed, and when there is no excuse.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ambassador_tests::conversation::LOST;
use ambassador_tests::wait::SOON;
use ambassador_tests::way::Way;
use anyhow::{Context, Result, ensure};

use crate::callers::Call;
use crate::hurts::{Hurt, Part};
use crate::scene::{NAMED, Scene};
use crate::variation::{HOLD, Variation};

/// So long after a server was hurt an ambassador may take it for lost.
const AFTERMATH: Duration = Duration::from_secs(5);

/// So long after all servers were down the first one is found, however its ambassador finds out.
const FOUND: Duration = Duration::from_secs(2);

/// Who was hurt, and what ambassadors did about it.
pub(crate) struct Evidence<'s> {
    scene: &'s Scene,
    /// Whose connections were given up, because they led to servers that were taken for lost; by the post.
    given_up: Vec<HashSet<SocketAddr>>,
}

impl<'s> Evidence<'s> {
    pub(crate) fn of(scene: &'s Scene) -> Result<Self> {
        let given_up = scene.posts().iter().map(|post| post.given_up()).collect::<Result<_>>()?;
        Ok(Self { scene, given_up })
    }

    /// That it failed as a whole, soon after somebody who took part was hurt.
    pub(crate) fn excuses(&self, call: &Call, behind: Duration, what: &str) -> Result<()> {
        let story = || self.story(call);
        ensure!(!what.contains(LOST), "{what}: {}", story());
        let hurt = self.when_hurt(call, behind);
        let hurt = hurt.with_context(|| format!("nobody was hurt, but {what}: {}", story()))?;
        let after = call.time.1.saturating_duration_since(hurt.max(call.time.0));
        ensure!(after < SOON, "it failed only {after:?} later: {what}: {}", story());
        Ok(())
    }

    /// When that was, at last; the server may have heard of it so much later.
    pub(crate) fn when_hurt(&self, call: &Call, behind: Duration) -> Option<Instant> {
        let (from, to) = (call.time.0, call.time.1 + behind);
        let lately = (from - AFTERMATH, to);
        let hurt = self.last((from, to), |part| takes_part(call, part));
        hurt.or_else(|| self.when_lost(call, lately)).or_else(|| self.when_all_hurt(call, lately))
    }

    /// Whether its ambassador says that it has given it up.
    pub(crate) fn is_given_up(&self, call: &Call) -> bool {
        call.from.is_some_and(|from| self.given_up[call.post].contains(&from))
    }

    /// Whether it has to wait for a server, and gets one: begun while there was none, carried by an ambassador
    /// that lets connections wait, none of whom was hurt since.
    pub(crate) fn is_to_be_held(&self, call: &Call) -> bool {
        let began = call.time.0;
        // On `direct` whoever comes first finds out.
        let waits = call.way != Way::Direct
            && !self.is_given_up(call)
            && self.variations(call).all(|it| it.holds() && it.first_endpoint() < NAMED[0]);
        let outages = self.scene.hurts.during((began, began), |part| part == Part::AllServers);
        outages.iter().any(|outage| {
            let ends_in_time = outage.ended.is_some_and(|it| it + FOUND < began + HOLD);
            let hurts = self.scene.hurts.during(call.time, |part| is_way(call, part));
            let again =
                |hurt: &Hurt| hurt.began > outage.began || hurt.part == Part::Ambassador(call.post);
            waits && ends_in_time && !hurts.iter().any(again)
        })
    }

    /// What is to be known of it, in a line.
    pub(crate) fn story(&self, call: &Call) -> String {
        let Call { seed, way, bytes, .. } = call;
        let who = call.server.map_or("nobody".to_owned(), |it| format!("server {it}"));
        let how = match &call.outcome {
            Ok(()) => "whole".to_owned(),
            Err(error) => format!("{error:#}").replace('\n', " "),
        };
        let hurts =
            self.scene.hurts.during(call.time, |part| is_way(call, part) || part == Part::Names);
        let hurts: Vec<_> = hurts.iter().map(|hurt| hurt.told(call.time.0)).collect();
        let variations: Vec<_> = self.variations(call).collect();
        format!(
            "seed {seed} by {way}, {bytes} bytes with {who}: {how}; {variations:?}; hurt: {}",
            hurts.join(", ")
        )
    }

    /// Its ambassador gave it up, and it led to a server that was hurt not long before.
    fn when_lost(&self, call: &Call, time: (Instant, Instant)) -> Option<Instant> {
        let ours = |server| call.server.is_none_or(|it| it == server);
        let lost = |part| matches!(part, Part::Server(it) | Part::Door(it) if ours(it));
        self.is_given_up(call).then(|| self.last(time, lost)).flatten()
    }

    /// Nobody answered it, and each server that it could go to was hurt, or nobody said where that is.
    fn when_all_hurt(&self, call: &Call, time: (Instant, Instant)) -> Option<Instant> {
        let is = |part, server| part == Part::Server(server) || part == Part::Door(server);
        let hurt = |server| self.last(time, |part| is(part, server));
        let named = NAMED.into_iter().filter_map(hurt).max();
        let named = named.or_else(|| self.when_name_unknown(call, time))?;
        let first = self.variations(call).map(Variation::first_endpoint).max()?;
        let others: Option<Vec<_>> = (first..NAMED[0]).map(hurt).collect();
        call.server.is_none().then_some(others?.into_iter().fold(named, Instant::max))
    }

    /// Its ambassador was new when nobody knew the name.
    fn when_name_unknown(&self, call: &Call, time: (Instant, Instant)) -> Option<Instant> {
        let begun = |part| part == Part::Ambassador(call.post);
        let hurts = self.scene.hurts.during(time, |part| part == Part::Names).into_iter();
        let hurts = hurts.map(|hurt| hurt.began);
        hurts.filter(|it| self.last((*it - AFTERMATH, time.1), begun).is_some()).max()
    }

    /// When one of these was hurt last, in a time that includes some of these moments.
    fn last(&self, time: (Instant, Instant), is_one: impl Fn(Part) -> bool) -> Option<Instant> {
        self.scene.hurts.during(time, is_one).iter().map(|hurt| hurt.began).max()
    }

    /// All configurations it may have met.
    fn variations(&self, call: &Call) -> impl Iterator<Item = Variation> {
        let met: Vec<_> = self.scene.post(call.post).variations(call.time).collect();
        met.into_iter()
    }
}

/// Whether it fails when that is hurt.
fn takes_part(call: &Call, part: Part) -> bool {
    !matches!(part, Part::Door(_)) && is_way(call, part)
}

/// Whether it needs that, or may have needed it.
fn is_way(call: &Call, part: Part) -> bool {
    match part {
        Part::Server(server) | Part::Door(server) => call.server.is_none_or(|it| it == server),
        Part::Ambassador(post) => post == call.post && !call.is_direct(),
        Part::AllServers | Part::Names => false,
    }
}

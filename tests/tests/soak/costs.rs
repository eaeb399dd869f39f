//! What the ambassadors cost while nothing is carried: memory, descriptors, entries of the kernel's maps.

use std::collections::BTreeMap;

use ambassador_tests::pins::Map;
use ambassador_tests::server::missing;
use ambassador_tests::wait::until_true;
use anyhow::{Context, Result};

use crate::post::Post;
use crate::scene::Scene;
use crate::variation::Variation;

/// Both ends of those that are kept for the next one that needs one, and the standard outputs.
const PIPES: usize = 2 * 16 + 2;

/// By tier.
#[derive(Debug)]
pub(crate) struct Costs(BTreeMap<String, Cost>);

#[derive(Debug)]
struct Cost {
    kib: u64,
    /// But for pipes.
    files: usize,
    pipes: usize,
    /// By map; of those only whose length says something.
    entries: BTreeMap<String, usize>,
}

impl Costs {
    /// With the same configuration each time.
    pub(crate) fn of(scene: &Scene) -> Result<Self> {
        scene.posts().iter_mut().try_for_each(|post| post.reconfigure(Variation::PLAIN))?;
        Self::now(scene)
    }

    fn now(scene: &Scene) -> Result<Self> {
        let posts = scene.posts();
        let costs = posts.iter().map(|post| {
            until_true("the end of all connections", || carries_nothing(post))?;
            Ok((post.way.to_string(), Cost::of(post)?))
        });
        Ok(Self(costs.collect::<Result<_>>()?))
    }

    /// Waits until nothing costs more than it did, but for what is always in motion.
    pub(crate) fn of_when_not_above(scene: &Scene, before: &Self) -> Result<Self> {
        Self::of(scene)?;
        let mut last = None;
        let settled = until_true("what it costs to be what it was", || {
            let now = last.insert(Self::now(scene)?);
            Ok(now.0.iter().all(|(tier, cost)| cost.is_not_above(&before.0[tier])))
        });
        settled.with_context(|| format!("it was {before:?}, and is {last:?}"))?;
        last.context("look at the costs")
    }
}

impl Cost {
    fn of(post: &Post) -> Result<Self> {
        let process = &post.ambassador()?.process;
        let descriptors = process.descriptors()?;
        let pipes = descriptors.iter().filter(|it| it.starts_with("pipe:")).count();
        let (kib, files) = (process.rss()? / 1024, descriptors.len() - pipes);
        Ok(Self { kib, files, pipes, entries: entries(post)? })
    }

    fn is_not_above(&self, before: &Self) -> bool {
        let most = |map| before.entries.get(map).copied().unwrap_or(0) + 8;
        self.kib <= before.kib + 4096
            && self.files <= before.files + 2
            && self.pipes <= PIPES
            && self.entries.iter().all(|(map, count)| *count <= most(map))
    }
}

fn carries_nothing(post: &Post) -> Result<bool> {
    Ok(post.ambassador()?.connections()?.is_empty())
}

/// How many entries the maps have that it has pinned; none where nothing can tell.
fn entries(post: &Post) -> Result<BTreeMap<String, usize>> {
    match missing(&["bpftool"]) {
        Some(_) => Ok(BTreeMap::new()),
        None => Map::entries(&post.place),
    }
}

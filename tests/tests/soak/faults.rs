//! What goes wrong, one thing after another, by a seed.

use std::collections::BTreeMap;
use std::fmt;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ambassador_tests::noise::Noise;
use anyhow::{Context, Result};

use crate::hurts::Part;
use crate::scene::Scene;

/// Every fault is over after this time, and the next one comes within a third of it.
const LONGEST: u64 = 1500;

pub(crate) struct Faults {
    noise: Noise,
    happened: BTreeMap<&'static str, u32>,
}

impl Faults {
    pub(crate) fn new(seed: u64) -> Self {
        Self { noise: Noise::new(seed), happened: BTreeMap::new() }
    }

    /// Lets them happen until then, and leaves everything as it was.
    pub(crate) fn happen(
        &mut self,
        scene: &mut Scene,
        until: Instant,
        may_kill: bool,
    ) -> Result<()> {
        while Instant::now() < until {
            self.last(LONGEST / 3);
            let kind = self.noise.below(if may_kill { 11 } else { 9 });
            let (name, happened) = match kind {
                0 | 1 => ("server killed", self.kill_server(scene, false)),
                2 => ("server rude", self.kill_server(scene, true)),
                3 => ("server stopped", self.stop_server(scene)),
                4 => ("server blackholed", self.blackhole(scene)),
                5 => ("name moved", scene.rename(self.noise.below(3))),
                6 => ("configuration changed", self.reconfigure(scene)),
                7 => ("bad configuration", scene.posts[self.post(scene)].misconfigure()),
                8 => ("tiers switched off", self.switch_tiers_off(scene)),
                _ => ("ambassador killed", self.kill_ambassador(scene)),
            };
            happened.with_context(|| name.to_owned())?;
            *self.happened.entry(name).or_default() += 1;
        }
        Ok(())
    }

    fn kill_server(&mut self, scene: &mut Scene, is_rude: bool) -> Result<()> {
        let number = self.server(scene);
        scene.hurt(Part::Server(number), |scene| {
            let place = scene.pod.upstream.clone();
            scene.servers[number].kill()?;
            if is_rude {
                scene.servers[number].start(&place, true)?;
            }
            self.last(LONGEST);
            if is_rude {
                scene.servers[number].kill()?;
            }
            scene.servers[number].start(&place, false)
        })
    }

    fn stop_server(&mut self, scene: &mut Scene) -> Result<()> {
        let number = self.server(scene);
        scene.hurt(Part::Server(number), |scene| {
            scene.servers[number].signal(libc::SIGSTOP)?;
            self.last(LONGEST);
            scene.servers[number].signal(libc::SIGCONT)
        })
    }

    fn blackhole(&mut self, scene: &mut Scene) -> Result<()> {
        let number = self.server(scene);
        scene.hurt(Part::Server(number), |scene| {
            scene.blackhole(number)?;
            self.last(LONGEST);
            scene.lift_blackhole()
        })
    }

    fn reconfigure(&mut self, scene: &mut Scene) -> Result<()> {
        let (post, variation) = (self.post(scene), self.noise.below(256));
        scene.posts[post].reconfigure(variation)
    }

    fn switch_tiers_off(&mut self, scene: &Scene) -> Result<()> {
        let ambassador = scene.posts[self.post(scene)].ambassador()?;
        ambassador.command(&["tier", "all", "splice"])?.success()?;
        self.last(LONGEST);
        ambassador.command(&["tier", "all", "auto"])?.success().map(drop)
    }

    fn kill_ambassador(&mut self, scene: &mut Scene) -> Result<()> {
        let number = self.post(scene);
        scene.hurt(Part::Ambassador(number), |scene| {
            scene.posts[number].kill()?;
            self.last(LONGEST);
            scene.posts[number].start()
        })
    }

    /// Lets time pass: how long a fault lasts is part of it.
    fn last(&mut self, most: u64) {
        sleep(Duration::from_millis(self.noise.below(most)));
    }

    fn server(&mut self, scene: &Scene) -> usize {
        self.noise.below(scene.servers.len() as u64) as usize
    }

    fn post(&mut self, scene: &Scene) -> usize {
        self.noise.below(scene.posts.len() as u64) as usize
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.happened.fmt(f)
    }
}

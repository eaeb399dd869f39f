//! What goes wrong, by a seed: by several hands, so that it may be several things at once.

use std::collections::BTreeMap;
use std::fmt;
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use ambassador_tests::noise::Noise;
use anyhow::{Context, Result, anyhow};

use crate::hurts::Part;
use crate::scene::{POSTS, SERVERS, Scene};
use crate::server::Server;
use crate::variation::Variation;

/// Every fault is over after this time, in milliseconds: enough to be taken for lost.
const LONGEST: u64 = 2000;
/// The same of all servers at once, which connections outlast that are held.
const OUTAGE: u64 = 1000;
/// So long a hand rests.
const REST: u64 = 3000;
const FLAP: Duration = Duration::from_millis(200);
/// A third of the time none of them does anything, and more often one alone than two or all.
const HANDS: usize = 3;

pub(crate) struct Faults(Vec<Hand>);

/// Does one thing after another.
struct Hand {
    noise: Noise,
    happened: BTreeMap<&'static str, u32>,
}

impl Faults {
    pub(crate) fn new(noise: &mut Noise) -> Self {
        let seeds = (0..HANDS).map(|_| noise.below(u64::MAX));
        let hand = |seed| Hand { noise: Noise::new(seed), happened: BTreeMap::new() };
        Self(seeds.map(hand).collect())
    }

    /// Lets them happen until then, and leaves everything as it was.
    pub(crate) fn happen(&mut self, scene: &Scene, until: Instant, may_kill: bool) -> Result<()> {
        let noise = &mut self.0[0].noise;
        scene.posts().iter_mut().try_for_each(|post| post.reconfigure(Variation::of(noise)))?;
        scope(|scope| {
            let act = |hand| scope.spawn(move || Hand::act(hand, scene, until, may_kill));
            let acting: Vec<_> = self.0.iter_mut().map(act).collect();
            let panicked = |_| anyhow!("a hand panicked");
            acting.into_iter().try_for_each(|it| it.join().map_err(panicked).flatten())
        })
    }
}

impl Hand {
    fn act(&mut self, scene: &Scene, until: Instant, may_kill: bool) -> Result<()> {
        while Instant::now() < until {
            self.last(REST);
            let kind = self.noise.below(if may_kill { 17 } else { 15 });
            let (name, happened) = match kind {
                0 => ("server killed", self.kill_server(scene)),
                1 => ("server rude", self.replace_by_rude(scene)),
                2 => ("server stopped", self.stop_server(scene)),
                3 => ("server blackholed", self.blackhole(scene)),
                4 => ("server flapping", self.flap(scene)),
                5 => ("accept queue full", self.fill_queue(scene)),
                6 => ("handshakes slow", self.slow_handshakes(scene)),
                7 => ("all servers down", self.kill_all(scene)),
                8 => ("name moved", scene.names().lead(self.noise.below(3))),
                9 => ("name unknown", self.forget_name(scene)),
                10 => ("name server stopped", self.stop_names(scene)),
                11 => ("name server killed", self.kill_names(scene)),
                12 => ("configuration changed", self.reconfigure(scene)),
                13 => ("bad configuration", scene.post(self.post()).misconfigure()),
                14 => ("tiers switched off", self.switch_tiers_off(scene)),
                _ => ("ambassador killed", self.kill_ambassador(scene)),
            };
            happened.with_context(|| name.to_owned())?;
            *self.happened.entry(name).or_default() += 1;
        }
        Ok(())
    }

    /// Something that hurts a server, and its end.
    fn hurt_server(
        &mut self,
        scene: &Scene,
        part: fn(usize) -> Part,
        begin: impl FnOnce(&mut Server) -> Result<()>,
        end: impl FnOnce(&mut Server) -> Result<()>,
    ) -> Result<()> {
        let number = self.noise.below(SERVERS as u64) as usize;
        let mut server = scene.server(number);
        scene.hurt(&[part(number)], || {
            begin(&mut server)?;
            self.last(LONGEST);
            end(&mut server)
        })
    }

    fn kill_server(&mut self, scene: &Scene) -> Result<()> {
        self.hurt_server(scene, Part::Server, Server::kill, |it| it.start(false))
    }

    fn replace_by_rude(&mut self, scene: &Scene) -> Result<()> {
        let replace = |server: &mut Server, is_rude| {
            server.kill()?;
            server.start(is_rude)
        };
        self.hurt_server(scene, Part::Server, |it| replace(it, true), |it| replace(it, false))
    }

    fn stop_server(&mut self, scene: &Scene) -> Result<()> {
        let (stop, go_on) = (libc::SIGSTOP, libc::SIGCONT);
        self.hurt_server(scene, Part::Server, |it| it.signal(stop), |it| it.signal(go_on))
    }

    fn blackhole(&mut self, scene: &Scene) -> Result<()> {
        self.hurt_server(scene, Part::Server, |it| it.blackhole(), |it| it.lift())
    }

    fn flap(&mut self, scene: &Scene) -> Result<()> {
        let mut flaps = 1 + self.noise.below(4);
        let flap = |server: &mut Server| loop {
            server.kill()?;
            sleep(FLAP);
            server.start(false)?;
            flaps -= 1;
            if flaps == 0 {
                return Ok(());
            }
            sleep(FLAP);
        };
        self.hurt_server(scene, Part::Server, flap, |_| Ok(()))
    }

    fn fill_queue(&mut self, scene: &Scene) -> Result<()> {
        let (shut, open) = (libc::SIGUSR1, libc::SIGUSR2);
        self.hurt_server(scene, Part::Door, |it| it.signal(shut), |it| it.signal(open))
    }

    fn slow_handshakes(&mut self, scene: &Scene) -> Result<()> {
        self.hurt_server(scene, Part::Door, |it| it.slow_handshakes(), |it| it.lift())
    }

    fn kill_all(&mut self, scene: &Scene) -> Result<()> {
        let mut servers = scene.servers();
        let parts: Vec<_> = (0..SERVERS).map(Part::Server).collect();
        scene.hurt(&parts, || {
            servers.iter_mut().try_for_each(|server| server.kill())?;
            scene.hurt(&[Part::AllServers], || {
                self.last(OUTAGE);
                servers.iter_mut().try_for_each(|server| server.start(false))
            })
        })
    }

    fn forget_name(&mut self, scene: &Scene) -> Result<()> {
        let names = scene.names();
        scene.hurt(&[Part::Names], || {
            names.know_none()?;
            self.last(LONGEST);
            names.know_again()
        })
    }

    fn stop_names(&mut self, scene: &Scene) -> Result<()> {
        let names = scene.names();
        scene.hurt(&[Part::Names], || {
            names.signal(libc::SIGSTOP)?;
            self.last(LONGEST);
            names.signal(libc::SIGCONT)
        })
    }

    fn kill_names(&mut self, scene: &Scene) -> Result<()> {
        let mut names = scene.names();
        scene.hurt(&[Part::Names], || {
            names.kill();
            self.last(LONGEST);
            names.revive()
        })
    }

    fn reconfigure(&mut self, scene: &Scene) -> Result<()> {
        scene.post(self.post()).reconfigure(Variation::of(&mut self.noise))
    }

    fn switch_tiers_off(&mut self, scene: &Scene) -> Result<()> {
        let post = scene.post(self.post());
        let ambassador = post.ambassador()?;
        ambassador.command(&["tier", "all", "splice"])?.success()?;
        self.last(LONGEST);
        ambassador.command(&["tier", "all", "auto"])?.success().map(drop)
    }

    fn kill_ambassador(&mut self, scene: &Scene) -> Result<()> {
        let number = self.post();
        let mut post = scene.post(number);
        scene.hurt(&[Part::Ambassador(number)], || {
            post.kill()?;
            self.last(LONGEST);
            post.start(Variation::of(&mut self.noise))
        })
    }

    /// Lets time pass: how long a fault lasts is part of it.
    fn last(&mut self, most: u64) {
        sleep(Duration::from_millis(self.noise.below(most)));
    }

    fn post(&mut self) -> usize {
        self.noise.below(POSTS as u64) as usize
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut sums = BTreeMap::<_, u32>::new();
        for (name, times) in self.0.iter().flat_map(|hand| &hand.happened) {
            *sums.entry(name).or_default() += times;
        }
        let told: Vec<_> = sums.iter().map(|(name, times)| format!("{name} {times}")).collect();
        f.write_str(&told.join(", "))
    }
}

//! A place for an ambassador, which may be killed and told to change, and what it has told.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Instant;

use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::place::{BPFFS, Place};
use ambassador_tests::process::run;
use ambassador_tests::wait::SOON;
use ambassador_tests::way::Way;
use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::variation::{Theme, Variation};

/// One ambassador after another.
pub(crate) struct Post {
    pub(crate) way: Way,
    pub(crate) place: Place,
    pub(crate) theme: Theme,
    ambassador: Option<Ambassador>,
    /// The configurations so far, the one in force last.
    terms: Vec<Term>,
    /// The logs of those that were killed.
    logged: String,
}

/// The time in which a configuration may be in force.
struct Term {
    of: Variation,
    from: Instant,
    to: Option<Instant>,
}

impl Post {
    /// With an ambassador that carries this way.
    pub(crate) fn new(way: Way, place: Place, theme: Theme) -> Result<Self> {
        let (terms, logged) = (Vec::new(), String::new());
        let mut post = Self { way, place, theme, ambassador: None, terms, logged };
        post.start(Variation::PLAIN)?;
        Ok(post)
    }

    /// Starts the ambassador, which takes over what one before it has pinned.
    pub(crate) fn start(&mut self, variation: Variation) -> Result<()> {
        // Or `direct` could never do that later, and would be relayed where it is wanted.
        let variation = variation.closing();
        let launch = self.way.launch_in(&self.place)?.flag("--drain-deadline", "5s");
        self.vary(variation, |post| {
            post.ambassador = Some(launch.config(&variation.text(&post.theme))?.start()?);
            Ok(())
        })
    }

    pub(crate) fn kill(&mut self) -> Result<()> {
        let ambassador = self.ambassador.take().context("find the ambassador")?;
        ambassador.process.signal(libc::SIGKILL)?;
        self.logged += &ambassador.process.finish(SOON)?.stderr;
        Ok(())
    }

    /// Gives it another configuration.
    pub(crate) fn reconfigure(&mut self, variation: Variation) -> Result<()> {
        self.vary(variation, |post| {
            let text = variation.text(&post.theme);
            post.ambassador()?.reconfigure(&text)?.success().map(drop)
        })
    }

    /// Gives it one that is bad, and expects that it is refused.
    pub(crate) fn misconfigure(&self) -> Result<()> {
        let current = self.terms.last().context("find what is in force")?.of.text(&self.theme);
        let told = self.ambassador()?.reconfigure(&current.replace("listen", "lisen"))?;
        ensure!(told.code() == Some(78), "a bad configuration: {told:?}");
        // For the watch would read it again.
        std::fs::write(self.ambassador()?.configuration(), current).context("mend it")
    }

    pub(crate) fn ambassador(&self) -> Result<&Ambassador> {
        self.ambassador.as_ref().context("find the ambassador")
    }

    /// All that may have been in force in a time.
    pub(crate) fn variations(
        &self,
        (from, to): (Instant, Instant),
    ) -> impl Iterator<Item = Variation> {
        let terms = self.terms.iter().filter(move |term| term.from <= to);
        terms.filter(move |term| term.to.is_none_or(|it| it >= from)).map(|term| term.of)
    }

    /// Whose connections it says it has given up, because they led to whoever it took for lost.
    pub(crate) fn given_up(&self) -> Result<HashSet<SocketAddr>> {
        let log = format!("{}{}", self.logged, self.ambassador()?.process.stderr());
        let lines = log.lines().filter(|line| line.contains("host_lost"));
        let peers = lines.map(|line| {
            let line: Value = serde_json::from_str(line).context("parse a record")?;
            line["peer"].as_str().context("find a peer")?.parse().context("parse a peer")
        });
        peers.collect()
    }

    /// Ends the ambassador, and expects that nothing is left of it.
    pub(crate) fn end(self) -> Result<()> {
        self.ambassador.context("find the ambassador")?.end()?;
        let left = run(self.place.command("ls").arg(BPFFS), SOON)?;
        ensure!(!left.contains("ambassador"), "{} left {left}", self.way);
        Ok(())
    }

    fn vary(&mut self, to: Variation, act: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.terms.push(Term { of: to, from: Instant::now(), to: None });
        act(self)?;
        let now = Instant::now();
        let (_, before) = self.terms.split_last_mut().context("find what was in force")?;
        before.iter_mut().for_each(|term| {
            term.to.get_or_insert(now);
        });
        Ok(())
    }
}

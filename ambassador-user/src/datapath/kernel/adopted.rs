//! The kernel half that another process has pinned, opened to be used.

use ambassador_ebpf::VERSION;
use anyhow::{Result, bail, ensure};

use super::{Hold, Kernel, netns_cookie, own_hash};
use crate::config::{Acceleration, Cgroup};
use crate::datapath::cgroup;
use crate::datapath::pins::Pins;
use crate::datapath::sockmap::Sockmap;
use crate::datapath::tables::{Ends, Tables};

/// What is pinned, opened.
pub(super) struct Adopted {
    tables: Tables,
    ends: Ends,
    pub(super) sockmap: Result<Sockmap, String>,
    pub(super) is_of_this_build: bool,
}

impl Adopted {
    /// If its contract is ours, and it acts on what we are to act on.
    pub(super) fn from(pins: &Pins, acceleration: &Acceleration) -> Result<Self> {
        let mut maps = pins.maps()?;
        let (tables, ends) = Tables::new(&mut maps)?;
        let settings = tables.settings();
        ensure!(
            settings.version == VERSION,
            "{} was pinned by another version (contract {}, ours is {VERSION}); load it again with \
             `ambassador load` of this version",
            pins.directory().display(),
            settings.version
        );
        ensure!(
            settings.netns_cookie == netns_cookie()?,
            "{} was pinned for another network namespace; give this ambassador its own --instance",
            pins.directory().display()
        );
        if let Cgroup::At(path) = &acceleration.cgroup
            && cgroup::inode(path)? != settings.cgroup
        {
            bail!("{} was pinned for another cgroup", pins.directory().display());
        }
        let is_of_this_build = settings.object == own_hash()?;
        let sockmap = Sockmap::new(&mut maps, acceleration.inflight)
            .map_err(|error| format!("not among what was pinned: {error:#}"));
        Ok(Self { tables, ends, sockmap, is_of_this_build })
    }

    /// Whoever adopts cannot try; whoever loaded has.
    pub(super) fn counts_waiting_bytes(&self) -> bool {
        self.tables.settings().counts_waiting_bytes != 0
    }

    /// Why nothing can be redirected.
    pub(super) fn no_direct(&self) -> Option<String> {
        let why = || {
            "not among what was pinned: it did not work where that was loaded, whose log says why"
                .to_owned()
        };
        (self.tables.settings().redirects == 0).then(why)
    }

    pub(super) fn take_over(self, pins: Pins) -> Kernel {
        let kept = self.tables.settings().kept != 0;
        Kernel {
            no_direct: self.no_direct(),
            sockmap_is_noticed: !self.counts_waiting_bytes(),
            tables: self.tables,
            ends: self.ends,
            sockmap: self.sockmap,
            messages: None,
            hold: Hold::Pins { pins, before: None, kept },
        }
    }
}

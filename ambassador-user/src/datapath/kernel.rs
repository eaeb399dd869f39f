//! The kernel half in force: found pinned, or loaded, tried and attached; and given up in order.

mod adopted;
mod examined;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use ambassador_ebpf::VERSION;
use anyhow::{Context, Result};
use tracing::{info, warn};

use self::adopted::Adopted;
pub use self::examined::examine;
use super::messages::Messages;
use super::obstacle::{self, Obstacle};
use super::pins::{Owner, Pins};
use super::programs::{Links, Maps, Programs};
use super::selftest::{Extent, Found};
use super::sockmap::Sockmap;
use super::tables::{Ends, Settings, Tables};
use super::{cgroup, known_bad, object, selftest};
use crate::config::{Acceleration, Config, InFlight};
use crate::privileges;

/// Room for routes that a later configuration may have.
const SPARE_ROUTES: u32 = 64;

/// The maps, and what keeps the programs attached.
pub struct Kernel {
    pub tables: Tables,
    pub ends: Ends,
    /// None of programs that another process loaded.
    pub messages: Option<Messages>,
    /// Why nothing can be redirected.
    pub no_direct: Option<String>,
    /// Or why there is none.
    pub sockmap: Result<Sockmap, String>,
    /// Whether non-blocking clients may notice that tier too, as far as is known.
    pub sockmap_is_noticed: bool,
    pub hold: Hold,
}

/// What keeps the programs attached.
#[must_use = "dropping it may detach the programs"]
pub enum Hold {
    /// This process.
    Process { _links: Links },
    /// Files. Those that this process made it removes at a clean end; after any other they stay. Until
    /// [`Hold::outlive`] what was pinned before is in force beside them.
    Pins { pins: Pins, before: Option<Pins>, kept: bool },
}

/// When what a process has loaded is to be gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// With this process; where there is a bpffs, at its clean end.
    OurEnd,
    /// At the clean end of the ambassador that takes it over.
    TheirEnd,
    /// When somebody unloads it.
    Unload,
}

impl Kernel {
    /// Takes over what is pinned for this instance, or else loads, tries and attaches the programs, and tells
    /// what was found.
    pub fn open(
        acceleration: &Acceleration,
        routes: u32,
        tried: impl FnOnce(&Found),
    ) -> Result<Self, Obstacle> {
        if object().is_none() {
            return Err(Obstacle::NotEmbedded);
        }
        let pins = Pins::find(&instance(acceleration)?).map_err(Obstacle::NotOurs)?;
        let may_load = obstacle::to_load();
        let Some(pins) = pins else {
            return may_load.and_then(|()| Self::load_for_us(acceleration, routes, tried));
        };
        let place = pins.directory().display().to_string();
        let adopted = match Adopted::from(&pins, acceleration) {
            // One that does not redirect may now, and has no connections that would go uncounted.
            Ok(adopted)
                if adopted.is_of_this_build
                    && (adopted.no_direct().is_none() || may_load.is_err()) =>
            {
                info!("taking over the kernel half pinned at {place}");
                return Ok(adopted.take_over(pins));
            }
            Ok(adopted) => Some(adopted),
            Err(error) if may_load.is_err() => return Err(Obstacle::NotOurs(error)),
            Err(error) => {
                info!("replacing the kernel half at {place}: {error:#}");
                None
            }
        };
        if may_load.is_ok() && !pins.are_ours_to_replace() {
            // Later, without privileges, it could not be removed.
            pins.remove().map_err(Obstacle::NotOurs)?;
            return Self::load_for_us(acceleration, routes, tried);
        }
        match (may_load.and_then(|()| Self::load_for_us(acceleration, routes, tried)), adopted) {
            (Ok(mut kernel), _) => {
                kernel.hold.succeed(pins).map_err(Obstacle::NotOurs)?;
                Ok(kernel)
            }
            (Err(obstacle), Some(adopted)) => {
                let how = match adopted.is_of_this_build {
                    true => "without `direct`",
                    false => "of another build",
                };
                warn!(
                    "taking over the kernel half pinned at {place}, which is {how}; `ambassador load` of this \
                     version replaces it (here: {obstacle})"
                );
                Ok(adopted.take_over(pins))
            }
            (Err(obstacle), None) => {
                // What never is stale would lead by the routes of then for ever.
                if acceleration.stale_after.is_none() {
                    pins.remove().map_err(Obstacle::NotOurs)?;
                }
                Err(obstacle)
            }
        }
    }

    fn load_for_us(
        acceleration: &Acceleration,
        routes: u32,
        tried: impl FnOnce(&Found),
    ) -> Result<Self, Obstacle> {
        let owner = Owner { uid: privileges::effective_user(), gid: u32::MAX };
        Self::load(acceleration, routes, owner, Lifetime::OurEnd, tried)
    }

    /// Loads, attaches and tries, and pins for a user if there is a bpffs.
    pub fn load(
        acceleration: &Acceleration,
        routes: u32,
        owner: Owner,
        lifetime: Lifetime,
        tried: impl FnOnce(&Found),
    ) -> Result<Self, Obstacle> {
        let cgroup = cgroup::find(&acceleration.cgroup).map_err(Obstacle::NoCgroup)?;
        let instance = instance(acceleration)?;
        let room = routes.saturating_add(SPARE_ROUTES);
        let mut attached = Attached::to(&cgroup, room)?;
        let found = attached.examine(Extent::START).map_err(Obstacle::Refused)?;
        tried(&found);
        match (found.no_direct(), found.no_sockmap()) {
            (Some(direct), Some(sockmap)) => return Err(Obstacle::Fails { direct, sockmap }),
            (Some(why), None) => attached.leave_out_direct(why),
            (None, Some(why)) => attached.leave_out_sockmap(why),
            (None, None) => {}
        }
        if attached.programs.no_sockmap().is_none() {
            known_bad::here().iter().for_each(|bug| warn!("sockmap: {bug}"));
        }
        let kernel = attached.serve(&instance, owner, lifetime, acceleration.inflight, &found);
        let kernel = kernel.map_err(|error| error.downcast().unwrap_or_else(Obstacle::Refused))?;
        // Nobody else on a node does: a Pod that was killed cannot, and nothing runs after a Pod.
        match Pins::remove_stale() {
            Ok(removed) => removed.iter().for_each(|it| info!("removed {}: stale", it.display())),
            Err(error) => info!("what is stale is left: {error:#}"),
        }
        Ok(kernel)
    }
}

/// The programs attached to a cgroup, where they leave every connection alone until they are told of
/// routes.
struct Attached<'a> {
    cgroup: &'a Path,
    opened: File,
    programs: Programs,
    links: Links,
    maps: Maps,
}

impl<'a> Attached<'a> {
    fn to(cgroup: &'a Path, routes: u32) -> Result<Self, Obstacle> {
        let opened = File::open(cgroup).with_context(|| format!("open {}", cgroup.display()));
        let opened = opened.map_err(Obstacle::NoCgroup)?;
        let mut programs = Programs::load(routes).map_err(Obstacle::Refused)?;
        let links = programs.attach(&opened);
        if let (Some(direct), Some(sockmap)) = (programs.no_direct(), programs.no_sockmap()) {
            let (direct, sockmap) = (direct.to_owned(), sockmap.to_owned());
            return Err(Obstacle::Fails { direct, sockmap });
        }
        let maps = programs.maps();
        Ok(Self { cgroup, opened, programs, links, maps })
    }

    fn examine(&self, extent: Extent) -> Result<Found> {
        selftest::run(&self.maps, &self.programs, self.cgroup, extent, None)
    }

    fn leave_out_direct(&mut self, why: String) {
        self.programs.leave_out_direct(why);
        self.links.leave_out_direct();
    }

    fn leave_out_sockmap(&mut self, why: String) {
        self.programs.leave_out_sockmap(why);
        self.links.leave_out_sockmap();
        self.maps.leave_out_sockmap();
    }

    /// Pins for a user if there is a bpffs, and hands out what is there to be used.
    fn serve(
        self,
        instance: &str,
        owner: Owner,
        lifetime: Lifetime,
        inflight: InFlight,
        found: &Found,
    ) -> Result<Kernel> {
        let Self { cgroup, opened, mut programs, links, mut maps } = self;
        let messages = Some(programs.messages()?);
        let pinned = Pins::make(instance, &maps, links, owner);
        let (mut tables, ends) = Tables::new(&mut maps)?;
        let sockmap = match found.no_sockmap() {
            Some(why) => Err(why),
            None => Ok(Sockmap::new(&mut maps, inflight)?),
        };
        let kept = lifetime == Lifetime::Unload;
        tables.found(Settings {
            kept: kept.into(),
            redirects: found.no_direct().is_none().into(),
            counts_waiting_bytes: found.counts_waiting_bytes.into(),
            ..settings(cgroup)?
        })?;
        let hold = match pinned {
            Ok(pins) => Hold::Pins { pins, before: None, kept },
            Err(error) if lifetime != Lifetime::OurEnd => {
                return Err(Obstacle::NotPinned(error).into());
            }
            Err(error) => {
                info!("the kernel half ends with this process, however that ends: {error:#}");
                // Attached again: what was pinned went with the pins.
                Hold::Process { _links: programs.attach(&opened) }
            }
        };
        info!(cgroup = %cgroup.display(), "the kernel half is attached");
        let sockmap_is_noticed = !found.counts_waiting_bytes;
        let no_direct = found.no_direct();
        Ok(Kernel { tables, ends, no_direct, sockmap, sockmap_is_noticed, messages, hold })
    }
}

impl Hold {
    /// Whether the programs stay attached when this process ends well.
    pub fn stays(&self) -> bool {
        matches!(self, Self::Pins { kept: true, .. })
    }

    /// From now on the programs stay attached when this process dies, in the place of what was pinned
    /// before.
    pub fn outlive(&mut self) -> Result<()> {
        match self {
            Self::Process { .. } => Ok(()),
            Self::Pins { pins, before, .. } => pins.outlive(before.take()),
        }
    }

    /// These are what was pinned before.
    fn succeed(&mut self, pins: Pins) -> Result<()> {
        match self {
            Self::Process { .. } => pins.remove(),
            Self::Pins { before, .. } => {
                *before = Some(pins);
                Ok(())
            }
        }
    }

    /// Detaches what this process attached, so that nothing is left behind.
    pub fn release(self) -> Result<()> {
        match self {
            Self::Process { .. } | Self::Pins { kept: true, .. } => Ok(()),
            Self::Pins { pins, kept: false, .. } => pins.remove(),
        }
    }
}

/// Loads, tries, attaches and pins, for a user whose ambassador takes over. What was pinned before is
/// replaced, once all that has succeeded.
pub fn load_for(config: &Config, owner: Owner, lifetime: Lifetime) -> Result<(), Obstacle> {
    obstacle::to_load()?;
    let before = Pins::find(&instance(&config.acceleration)?).map_err(Obstacle::NotOurs)?;
    let routes = u32::try_from(config.routes.len()).unwrap_or(u32::MAX);
    let mut kernel = Kernel::load(&config.acceleration, routes, owner, lifetime, |_| ())?;
    before.map_or(Ok(()), |pins| kernel.hold.succeed(pins)).map_err(Obstacle::NotOurs)?;
    kernel.hold.outlive().map_err(Obstacle::NotOurs)?;
    if let Hold::Pins { pins, .. } = &kernel.hold {
        info!(uid = owner.uid, gid = owner.gid, "pinned at {}", pins.directory().display());
    }
    Ok(())
}

/// Whether anything is pinned for this instance.
pub fn is_pinned(acceleration: &Acceleration) -> bool {
    instance(acceleration).is_ok_and(|instance| Pins::exist(&instance))
}

fn instance(acceleration: &Acceleration) -> Result<String, Obstacle> {
    match &acceleration.instance {
        Some(name) => Ok(name.to_string()),
        None => default_instance().map_err(Obstacle::Refused),
    }
}

/// The name of an instance that was given none: after the network namespace, which is the same for all
/// containers of a Pod and no other's.
pub fn default_instance() -> Result<String> {
    Ok(format!("net-{}", netns_cookie()?))
}

/// What the kernel knows the network namespace by; no other has had it since the machine started.
pub fn netns_cookie() -> Result<u64> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
        .context("open a socket")?;
    /// include/uapi/asm-generic/socket.h; the libc crate does not have it.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0_u64;
    let mut size = size_of::<u64>() as libc::socklen_t;
    // SAFETY: both pointers are to what lives until the call returns, and `size` is that of `cookie`.
    let got = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut size,
        )
    };
    if got != 0 {
        let error = std::io::Error::last_os_error();
        return Err(error).context("ask for the network namespace's cookie (Linux 5.14 or later)");
    }
    Ok(cookie)
}

/// What this process says of tables that it has loaded for a cgroup and not tried yet.
pub fn settings(cgroup: &Path) -> Result<Settings> {
    Ok(Settings {
        version: VERSION,
        kept: 0,
        redirects: 0,
        counts_waiting_bytes: 0,
        reserved: 0,
        netns_cookie: netns_cookie()?,
        fresh_until: 0,
        cgroup: cgroup::inode(cgroup)?,
        object: own_hash()?,
    })
}

fn own_hash() -> Result<[u8; 32]> {
    let text = object().context("this binary was built without the eBPF object")?.sha256;
    let mut hash = [0; 32];
    for (byte, digits) in hash.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digits = str::from_utf8(digits).context("read the object's hash")?;
        *byte = u8::from_str_radix(digits, 16).context("read the object's hash")?;
    }
    Ok(hash)
}

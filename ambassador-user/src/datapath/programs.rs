//! The programs and maps of the object: loaded, attached, and handed out by name.

use std::collections::HashMap;
use std::os::fd::AsFd;

use ambassador_ebpf::direct::{
    CONNECT4, CONNECT6, GETPEERNAME4, GETPEERNAME6, IPV6ONLY_BIT, LIFECYCLE, MOST_ROUTES, TABLES,
};
use anyhow::{Context, Result};
use aya::maps::{Map, MapError};
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, CgroupSockAddr, SockOps};
use aya::{Ebpf, EbpfLoader};

use super::messages::{self, Messages};
use super::sockmap::layout;
use super::{object, obstacle};

/// The programs on connect(2) and getpeername(2).
const ADDRESS_HOOKS: [&str; 4] = [CONNECT4, CONNECT6, GETPEERNAME4, GETPEERNAME6];

/// The loaded object. It does nothing before it is attached.
pub struct Programs(Ebpf);

/// Maps by their names, of an object that was just loaded or of one that somebody has pinned.
#[derive(Debug, Default)]
pub struct Maps(pub HashMap<String, Map>);

/// What keeps a program attached, by the program's name.
pub type Links = Vec<(&'static str, FdLink)>;

impl Programs {
    /// Loads all, with room for the tables of as many routes.
    pub fn load(routes: u32) -> Result<Self> {
        let object = object().context("this binary was built without the eBPF object")?;
        // Without it a connection from IPv6 to IPv4 is left to user space, which is no reason to fail.
        let ipv6only_bit =
            if obstacle::may_trace() { layout::ipv6only_bit().unwrap_or(0) } else { 0 };
        let mut kernel = EbpfLoader::new()
            .override_global(IPV6ONLY_BIT, &ipv6only_bit, true)
            .map_max_entries(TABLES, 2 * routes.clamp(1, MOST_ROUTES))
            .load(object.bytes)
            .context("load the eBPF object")?;
        for name in ADDRESS_HOOKS {
            address_hook(&mut kernel, name)?.load().with_context(|| format!("load {name}"))?;
        }
        lifecycle(&mut kernel)?.load().context("load the lifecycle program")?;
        Ok(Self(kernel))
    }

    /// What they say.
    pub fn messages(&mut self) -> Result<Messages> {
        Messages::of(&mut self.0)
    }

    /// The maps, which can be taken once.
    pub fn maps(&mut self) -> Maps {
        let names =
            self.0.maps().map(|(name, _)| name.to_owned()).filter(|name| name != messages::MAP);
        let names: Vec<_> = names.collect();
        let maps = names.into_iter().filter_map(|name| {
            let map = self.0.take_map(&name)?;
            Some((name, map))
        });
        Maps(maps.collect())
    }

    /// Attaches all to a cgroup, opened as a directory; they see its sockets and those of all below.
    pub fn attach(&mut self, cgroup: impl AsFd) -> Result<Links> {
        let mut links = Vec::with_capacity(ADDRESS_HOOKS.len() + 1);
        // Before the hooks that redirect, so that no redirected connection goes uncounted.
        // `Single` is about older kernels; links stand beside the programs of others anyway.
        let program = lifecycle(&mut self.0)?;
        let id = program
            .attach(&cgroup, CgroupAttachMode::Single)
            .context("attach the lifecycle program to the cgroup")?;
        let link = program.take_link(id).context("own the lifecycle program's attachment")?;
        links.push((LIFECYCLE, link.try_into().context("hold the lifecycle program's link")?));
        // What restores an address first, so that no app sees what has replaced it.
        for name in [GETPEERNAME4, GETPEERNAME6, CONNECT4, CONNECT6] {
            let program = address_hook(&mut self.0, name)?;
            let id = program
                .attach(&cgroup, CgroupAttachMode::Single)
                .with_context(|| format!("attach {name} to the cgroup"))?;
            let link =
                program.take_link(id).with_context(|| format!("own the attachment of {name}"))?;
            let link = link.try_into().with_context(|| format!("hold the link of {name}"))?;
            links.push((name, link));
        }
        Ok(links)
    }
}

impl Maps {
    /// The map of this name, opened as what it is.
    pub fn take<M: TryFrom<Map, Error = MapError>>(&mut self, name: &str) -> Result<M> {
        let map = self.0.remove(name).with_context(|| format!("find the map {name}"))?;
        M::try_from(map).with_context(|| format!("open the map {name}"))
    }
}

fn address_hook<'k>(kernel: &'k mut Ebpf, name: &str) -> Result<&'k mut CgroupSockAddr> {
    let program = kernel.program_mut(name).with_context(|| format!("find {name} in the object"))?;
    program.try_into().with_context(|| format!("open {name}"))
}

fn lifecycle(kernel: &mut Ebpf) -> Result<&mut SockOps> {
    let program = kernel.program_mut(LIFECYCLE).context("find the lifecycle program")?;
    program.try_into().context("open the lifecycle program")
}

//! The programs and maps of the object: loaded, attached, and handed out by name.

use std::collections::HashMap;
use std::os::fd::AsFd;

use ambassador_ebpf::direct::{
    CONNECT4, CONNECT6, GETPEERNAME4, GETPEERNAME6, IPV6ONLY_BIT, LIFECYCLE, MOST_ROUTES,
    MULTIPATH, SOCKET_ERROR, TABLES,
};
use ambassador_ebpf::sockmap::{
    self, CLIENT_SOCKETS, ENROL, SOCKET_LAYOUT, SocketLayout, Tuple, UPLINK,
};
use anyhow::{Context, Result, bail};
use aya::maps::sock::SockMapFd;
use aya::maps::{Map, MapData, MapError, SockHash};
use aya::programs::links::FdLink;
use aya::programs::sk_msg::SkMsgLink;
use aya::programs::{CgroupAttachMode, CgroupSockAddr, SkMsg, SockOps};
use aya::{Ebpf, EbpfLoader};

use super::messages::{self, Messages};
use super::sockmap::layout::{self, Layout};
use super::{known_bad, object, obstacle};
use crate::process;

/// The programs on connect(2) and getpeername(2).
const ADDRESS_HOOKS: [&str; 4] = [CONNECT4, CONNECT6, GETPEERNAME4, GETPEERNAME6];

/// The loaded object. It does nothing before it is attached.
pub struct Programs {
    kernel: Ebpf,
    /// Why there is no `direct` tier, and the other does without.
    no_direct: Option<String>,
    /// What the uplink is attached to; or why there is no `sockmap` tier, and the other does without.
    client_sockets: Result<SockMapFd, String>,
}

/// Maps by their names, of an object that was just loaded or of one that somebody has pinned.
#[derive(Debug, Default)]
pub struct Maps(pub HashMap<String, Map>);

/// What keeps the programs attached.
#[derive(Default)]
pub struct Links {
    /// To a cgroup, by the program's name.
    pub to_cgroup: Vec<(&'static str, FdLink)>,
    /// To the map of client sockets: ends when it is dropped, and cannot be pinned; but forgotten, it
    /// lasts as long as the map.
    pub to_sockets: Option<SkMsgLink>,
}

impl Programs {
    /// Loads all, with room for the tables of as many routes.
    pub fn load(routes: u32) -> Result<Self> {
        let object = object().context("this binary was built without the eBPF object")?;
        let layout = obstacle::may_trace()
            .then(layout::of_this_kernel)
            .unwrap_or_else(|| bail!("not permitted to read sockets; grant CAP_PERFMON"));
        // Without these a connection from IPv6 to IPv4 is left to user space, a reset may be either side's, and
        // an MPTCP socket shows where it was led: no reasons to fail.
        let (layout, [ipv6only_bit, socket_error, multipath]) = match layout {
            Ok(Layout { sockets, ipv6only_bit, socket_error, multipath }) => {
                (sockets, [ipv6only_bit, socket_error, multipath].map(|it| it.unwrap_or(0)))
            }
            Err(error) => (Err(error), [0; 3]),
        };
        let known = *layout.as_ref().unwrap_or(&SocketLayout::default());
        let mut kernel = loader()?
            .override_global(IPV6ONLY_BIT, &ipv6only_bit, true)
            .override_global(SOCKET_ERROR, &socket_error, true)
            .override_global(MULTIPATH, &multipath, true)
            .map_max_entries(TABLES, 2 * routes.clamp(1, MOST_ROUTES))
            .override_global(SOCKET_LAYOUT, &known, true)
            .load(object.bytes)
            .context("load the eBPF object")?;
        let no_direct = load_direct(&mut kernel).err().map(|error| obstacle::refused(&error));
        let client_sockets = match known_bad::obstacle() {
            Some(why) => Err(why),
            None => layout
                .and_then(|_known| load_sockmap(&mut kernel))
                .map_err(|error| obstacle::one_line(&error)),
        };
        Ok(Self { kernel, no_direct, client_sockets })
    }

    /// What they say.
    pub fn messages(&mut self) -> Result<Messages> {
        Messages::of(&mut self.kernel)
    }

    /// Why there is no `direct` tier.
    pub fn no_direct(&self) -> Option<&str> {
        self.no_direct.as_deref()
    }

    /// Does without the `direct` tier.
    pub fn leave_out_direct(&mut self, why: String) {
        self.no_direct = Some(why);
    }

    /// Why there is no `sockmap` tier.
    pub fn no_sockmap(&self) -> Option<&str> {
        self.client_sockets.as_ref().err().map(String::as_str)
    }

    /// Does without the `sockmap` tier.
    pub fn leave_out_sockmap(&mut self, why: String) {
        self.client_sockets = Err(why);
    }

    /// The maps of the tiers that there are, which can be taken once.
    pub fn maps(&mut self) -> Maps {
        let without = self.no_sockmap().is_some();
        let left_out =
            |name: &str| name == messages::MAP || without && sockmap::MAPS.contains(&name);
        let names = self.kernel.maps().map(|(name, _)| name.to_owned());
        let names: Vec<_> = names.filter(|name| !left_out(name)).collect();
        let maps = names.into_iter().filter_map(|name| {
            let map = self.kernel.take_map(&name)?;
            Some((name, map))
        });
        Maps(maps.collect())
    }

    /// Attaches those of the tiers that there are to a cgroup, opened as a directory; they see its sockets and
    /// those of all below. A tier of which one cannot be attached there is none of.
    pub fn attach(&mut self, cgroup: impl AsFd) -> Links {
        let mut links = Links::default();
        if let Ok(sockets) = &self.client_sockets
            && let Err(error) = attach_sockmap(&mut self.kernel, sockets, &cgroup, &mut links)
        {
            links.leave_out_sockmap();
            self.leave_out_sockmap(obstacle::refused(&error));
        }
        if self.no_direct.is_none()
            && let Err(error) = attach_direct(&mut self.kernel, &cgroup, &mut links)
        {
            links.leave_out_direct();
            self.leave_out_direct(obstacle::refused(&error));
        }
        links
    }
}

impl Maps {
    /// The same maps, through descriptors of their own.
    pub fn duplicate(&self) -> Result<Self> {
        let maps = self.0.iter().map(|(name, map)| {
            let again = duplicate(map).with_context(|| format!("open the map {name} again"))?;
            Ok((name.clone(), again))
        });
        Ok(Self(maps.collect::<Result<_>>()?))
    }

    /// Does without those of the `sockmap` tier.
    pub fn leave_out_sockmap(&mut self) {
        self.0.retain(|name, _| !sockmap::MAPS.contains(&name.as_str()));
    }

    /// The map of this name, opened as what it is.
    pub fn take<M: TryFrom<Map, Error = MapError>>(&mut self, name: &str) -> Result<M> {
        let map = self.0.remove(name).with_context(|| format!("find the map {name}"))?;
        M::try_from(map).with_context(|| format!("open the map {name}"))
    }
}

impl Links {
    /// Detaches those of the `direct` tier.
    pub fn leave_out_direct(&mut self) {
        self.to_cgroup.retain(|(name, _)| *name == ENROL);
    }

    /// Detaches those of the `sockmap` tier.
    pub fn leave_out_sockmap(&mut self) {
        self.to_cgroup.retain(|(name, _)| *name != ENROL);
        self.to_sockets = None;
    }
}

/// A loader. Each reads and parses the kernel's whole BTF when it is made, in case that an object refers
/// to it, and cannot be told not to: a quarter of the time until we are ready, and most of the memory.
/// Ours does not refer to it, so it is kept from finding it, as long as no other thread could notice.
fn loader<'a>() -> Result<EbpfLoader<'a>> {
    if !process::is_single_threaded() {
        return Ok(EbpfLoader::new());
    }
    process::without_opening_files(EbpfLoader::new).context("keep the loader from reading BTF")
}

fn duplicate(map: &Map) -> Result<Map> {
    let (Map::Array(data)
    | Map::HashMap(data)
    | Map::LruHashMap(data)
    | Map::RingBuf(data)
    | Map::SkStorage(data)
    | Map::SockHash(data)) = map
    else {
        bail!("it is of no kind that the contract has")
    };
    let descriptor = data.fd().as_fd().try_clone_to_owned()?;
    Ok(Map::from_map_data(MapData::from_fd(descriptor)?)?)
}

fn address_hook<'k>(kernel: &'k mut Ebpf, name: &str) -> Result<&'k mut CgroupSockAddr> {
    let program = kernel.program_mut(name).with_context(|| format!("find {name} in the object"))?;
    program.try_into().with_context(|| format!("open {name}"))
}

fn load_direct(kernel: &mut Ebpf) -> Result<()> {
    for name in ADDRESS_HOOKS {
        address_hook(kernel, name)?.load().with_context(|| format!("load {name}"))?;
    }
    sock_ops(kernel, LIFECYCLE)?.load().context("load the lifecycle program")
}

/// Returns the map that the uplink is attached to.
fn load_sockmap(kernel: &mut Ebpf) -> Result<SockMapFd> {
    sk_msg(kernel)?.load().context("load the uplink, which takes CAP_PERFMON too")?;
    sock_ops(kernel, ENROL)?.load().context("load the enrolment")?;
    let sockets = kernel.map(CLIENT_SOCKETS).context("find the map of client sockets")?;
    let sockets: SockHash<_, Tuple> = sockets.try_into().context("open the client sockets")?;
    sockets.fd().try_clone().context("share the map of client sockets")
}

fn attach_sockmap(
    kernel: &mut Ebpf,
    sockets: &SockMapFd,
    cgroup: impl AsFd,
    links: &mut Links,
) -> Result<()> {
    let uplink = sk_msg(kernel)?;
    let id = uplink.attach(sockets).context("attach the uplink to the client sockets")?;
    let link = uplink.take_link(id).context("own the uplink's attachment")?;
    links.to_sockets = Some(link);
    // Last, because from now on sockets are enrolled.
    links.to_cgroup.push((ENROL, attach_sock_ops(kernel, ENROL, cgroup)?));
    Ok(())
}

fn attach_direct(kernel: &mut Ebpf, cgroup: impl AsFd, links: &mut Links) -> Result<()> {
    // Before the hooks that redirect, so that no redirected connection goes uncounted.
    links.to_cgroup.push((LIFECYCLE, attach_sock_ops(kernel, LIFECYCLE, &cgroup)?));
    // What restores an address first, so that no app sees what has replaced it.
    for name in [GETPEERNAME4, GETPEERNAME6, CONNECT4, CONNECT6] {
        let program = address_hook(kernel, name)?;
        let id = program
            .attach(&cgroup, CgroupAttachMode::Single)
            .with_context(|| format!("attach {name} to the cgroup"))?;
        let link =
            program.take_link(id).with_context(|| format!("own the attachment of {name}"))?;
        let link = link.try_into().with_context(|| format!("hold the link of {name}"))?;
        links.to_cgroup.push((name, link));
    }
    Ok(())
}

fn attach_sock_ops(kernel: &mut Ebpf, name: &str, cgroup: impl AsFd) -> Result<FdLink> {
    let program = sock_ops(kernel, name)?;
    // `Single` is about older kernels; links stand beside the programs of others anyway.
    let id = program
        .attach(cgroup, CgroupAttachMode::Single)
        .with_context(|| format!("attach {name} to the cgroup"))?;
    let link = program.take_link(id).with_context(|| format!("own the attachment of {name}"))?;
    link.try_into().with_context(|| format!("hold the link of {name}"))
}

fn sock_ops<'k>(kernel: &'k mut Ebpf, name: &str) -> Result<&'k mut SockOps> {
    let program = kernel.program_mut(name).with_context(|| format!("find {name} in the object"))?;
    program.try_into().with_context(|| format!("open {name}"))
}

fn sk_msg(kernel: &mut Ebpf) -> Result<&mut SkMsg> {
    let program = kernel.program_mut(UPLINK).context("find the uplink in the object")?;
    program.try_into().context("open the uplink")
}

//! The connection tracker: counts what becomes of the TCP connections of a cgroup.

use std::os::fd::AsFd;

pub use ambassador_ebpf::ConnectionCounts;
use ambassador_ebpf::{CONNECTIONS, TRACKER};
use anyhow::{Context, Result};
use aya::Ebpf;
use aya::maps::PerCpuArray;
use aya::programs::sock_ops::SockOpsLink;
use aya::programs::{CgroupAttachMode, SockOps};

use super::object;

/// The loaded program with its own counts; gone from the kernel when dropped.
pub struct Tracker {
    kernel: Ebpf,
}

/// An attachment to one cgroup, which ends when this is dropped.
#[must_use = "dropping it detaches the tracker"]
pub struct Attached {
    _link: SockOpsLink,
}

impl Tracker {
    /// Loads the program. It counts nothing before it is attached.
    pub fn load() -> Result<Self> {
        let object = object().context("this binary was built without the eBPF object")?;
        let mut kernel = Ebpf::load(object.bytes).context("load the eBPF object")?;
        program(&mut kernel)?.load().context("load the connection tracker")?;
        Ok(Self { kernel })
    }

    /// Counts from now on the connections of a cgroup, opened as a directory, and of all below it.
    pub fn attach(&mut self, cgroup: impl AsFd) -> Result<Attached> {
        let tracker = program(&mut self.kernel)?;
        // `Single` is about older kernels; links stand beside the programs of others anyway.
        let link = tracker
            .attach(cgroup, CgroupAttachMode::Single)
            .context("attach the connection tracker to a cgroup")?;
        let _link = tracker.take_link(link).context("own the tracker's attachment")?;
        Ok(Attached { _link })
    }

    /// What happened while attached, over all CPUs.
    pub fn counts(&self) -> Result<ConnectionCounts> {
        let map = self.kernel.map(CONNECTIONS).context("find the map of connection counts")?;
        let counts: PerCpuArray<_, ConnectionCounts> =
            map.try_into().context("open the map of connection counts")?;
        let of_cpus = counts.get(&0, 0).context("read the connection counts")?;
        Ok(of_cpus.iter().fold(ConnectionCounts::default(), |sum, cpu| ConnectionCounts {
            opened: sum.opened + cpu.opened,
            accepted: sum.accepted + cpu.accepted,
            failed: sum.failed + cpu.failed,
            closed: sum.closed + cpu.closed,
        }))
    }
}

fn program(kernel: &mut Ebpf) -> Result<&mut SockOps> {
    kernel
        .program_mut(TRACKER)
        .context("find the connection tracker in the eBPF object")?
        .try_into()
        .context("open the connection tracker")
}

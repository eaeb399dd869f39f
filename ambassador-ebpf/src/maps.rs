//! Every map of the object, each with who writes, who reads and who deletes.

pub(crate) mod sockmap;

use ambassador_ebpf::ConnectionCounts;
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;

/// Written by the tracker, one CPU each. Read by user space, which adds the CPUs up. Nobody
/// deletes: elements of an array live as long as the map.
#[map]
pub(crate) static CONNECTIONS: PerCpuArray<ConnectionCounts> = PerCpuArray::with_max_entries(1, 0);

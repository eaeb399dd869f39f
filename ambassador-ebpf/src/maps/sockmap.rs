//! The maps of the `sockmap` tier, each with who writes, who reads and who deletes.

use ambassador_ebpf::sockmap::{
    ListenerKey, MOST_FLOWS, MOST_LISTENERS, Orders, Progress, SocketLayout, Tuple,
};
use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LruHashMap, SockHash};

use crate::allowance::Allowance;

/// Written once, by whoever loads the object. Constant to the verifier.
#[unsafe(no_mangle)]
pub(crate) static SOCKET_LAYOUT: Global<SocketLayout> = Global::new(SocketLayout {
    write_seq: 0,
    snd_una: 0,
    bytes_acked: 0,
    sk_socket: 0,
    sk_flags: 0,
    sk_sndbuf: 0,
    file: 0,
    f_flags: 0,
    zerocopy: 0,
    ulp: 0,
});

/// Written and deleted by user space. Read by `enrol`.
#[map]
pub(crate) static ENROL_LISTENERS: HashMap<ListenerKey, u64> =
    HashMap::with_max_entries(MOST_LISTENERS, 0);

/// Written by `enrol` and `uplink`, deleted by user space when a flow takes the client up or it is handed
/// back; the oldest make room.
#[map]
pub(crate) static ENROLLED: LruHashMap<Tuple, u64> = LruHashMap::with_max_entries(MOST_FLOWS, 0);

/// Written by `enrol` and `uplink`.
#[map]
pub(crate) static ALLOWANCE: Array<Allowance> = Array::with_max_entries(1, 0);

/// Written by `enrol`. Deleted by user space, to hand a socket back, and by the kernel when it closes.
#[map]
pub(crate) static CLIENT_SOCKETS: SockHash<Tuple> = SockHash::with_max_entries(MOST_FLOWS, 0);

/// Written by user space. Read by `uplink`. Deleted by the kernel when the socket closes.
#[map]
pub(crate) static UPLINK_SOCKETS: SockHash<u64> = SockHash::with_max_entries(MOST_FLOWS, 0);

/// Written by user space. Read by `enrol`. Goes with its socket.
#[btf_map]
pub(crate) static UPLINK_TAGS: SkStorage<u64> = SkStorage::new();

/// Written and deleted by user space. Read by `uplink` and `enrol`, which check with `ORDERS` what they find: a
/// deleted element may serve another flow while it is still being read.
#[map]
pub(crate) static FLOWS: HashMap<Tuple, u64> = HashMap::with_max_entries(MOST_FLOWS, 0);

/// Written by user space, read by `uplink` and `enrol`.
#[map]
pub(crate) static ORDERS: Array<Orders> = Array::with_max_entries(MOST_FLOWS, BPF_F_MMAPABLE);

/// Written by `uplink` and `enrol`, each its own lines; cleared by user space before a flow begins.
#[map]
pub(crate) static PROGRESS: Array<Progress> = Array::with_max_entries(MOST_FLOWS, BPF_F_MMAPABLE);

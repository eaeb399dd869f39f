//! Every map of the object, each with who writes, who reads and who deletes.

pub(crate) mod sockmap;

use ambassador_ebpf::Address;
use ambassador_ebpf::direct::{
    Carried, Flow, MISS_REASONS, MOST_ROUTES, Settings, Table, Target, TargetKey,
};
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, RingBuf};

/// Written by user space; read by the connect hooks and `enrol`. Nobody deletes.
#[map]
pub(crate) static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

/// Written by user space; read by the connect hooks; deleted by user space, which adds nothing afterwards until
/// hooks that may be reading what was deleted have ended.
#[map]
pub(crate) static LISTENERS: HashMap<Address, u32> =
    HashMap::with_max_entries(2 * MOST_ROUTES, BPF_F_NO_PREALLOC);

/// Written by user space; read by the connect hooks. Nobody deletes.
#[map]
pub(crate) static ROUTES: Array<u32> = Array::with_max_entries(MOST_ROUTES, 0);

/// Written by user space; read by the connect hooks. Nobody deletes.
#[map]
pub(crate) static CARRIED: Array<Carried> = Array::with_max_entries(MOST_ROUTES, 0);

/// Written and deleted by user space; read by the connect hooks.
#[map]
pub(crate) static CARRIED_TO: HashMap<TargetKey, Carried> =
    HashMap::with_max_entries(16 * 1024, BPF_F_NO_PREALLOC);

/// Written by user space while not in force; read by the connect hooks. Nobody deletes. User space
/// makes it as large as its routes need.
#[map]
pub(crate) static TABLES: Array<Table> = Array::with_max_entries(2, 0);

/// Written by the connect hooks (which make the elements) and the lifecycle; read by user space, which
/// deletes what no table names any more.
#[map]
pub(crate) static TARGETS: HashMap<TargetKey, Target> =
    HashMap::with_max_entries(16 * 1024, BPF_F_NO_PREALLOC);

/// Written by the connect hooks; read by user space. Nobody deletes.
#[map]
pub(crate) static MISSES: Array<u64> = Array::with_max_entries(MISS_REASONS, 0);

/// Written by the connect hooks and the lifecycle; read by these and the getpeername hooks; goes with
/// its socket, or when that connects elsewhere.
#[btf_map]
pub(crate) static REDIRECTED: SkStorage<Flow> = SkStorage::new();

/// Written and deleted by the lifecycle, as connections begin and end; read by user space. When it is
/// full, connections go unlisted.
#[map]
pub(crate) static OPEN: HashMap<u64, Flow> =
    HashMap::with_max_entries(64 * 1024, BPF_F_NO_PREALLOC);

/// Written by the lifecycle; read by user space. When it is full, ends go untold and are counted.
#[map]
pub(crate) static ENDS: RingBuf = RingBuf::with_byte_size(512 * 1024, 0);

/// Written and read by whatever program logs: when one last did. Nobody deletes.
#[map]
pub(crate) static LOGGED: Array<u64> = Array::with_max_entries(1, 0);

//! The `sockmap` tier: what the halves tell each other of a flow.
//!
//! A flow is a client's socket (A), the socket that accepted it (B) and the socket to the upstream (C).
//! While it is latched, what A sends goes straight to C. Each field has one writer.
//!
//! Byte order: addresses are in network order, IPv4 as `::ffff:a.b.c.d`; everything else, ports too, is
//! in that of the machine.

/// The sock_ops program that enrols the sockets of clients and follows what upstreams acknowledge.
pub const ENROL: &str = "enrol";
/// The sk_msg program that passes what a client sends on to its upstream's socket.
pub const UPLINK: &str = "uplink";

/// Where sockets of clients are enrolled: a hash of [`ListenerKey`] to `u64` flags.
pub const ENROL_LISTENERS: &str = "ENROL_LISTENERS";
/// Clients whose sockets have been enrolled, and that no flow has taken up: a hash of [`Tuple`] to flags, the
/// listener's and those that say what it has done.
pub const ENROLLED: &str = "ENROLLED";
/// The enrolled sockets of clients: a socket hash by [`Tuple`], to which [`UPLINK`] is attached.
pub const CLIENT_SOCKETS: &str = "CLIENT_SOCKETS";
/// The sockets to upstreams: a socket hash by the flow's id.
pub const UPLINK_SOCKETS: &str = "UPLINK_SOCKETS";
/// The id of the flow that a socket to an upstream belongs to, or 0 before there is one: socket storage.
pub const UPLINK_TAGS: &str = "UPLINK_TAGS";
/// Which flow a client's socket belongs to: a hash of [`Tuple`] to the flow's id.
pub const FLOWS: &str = "FLOWS";
/// What user space says of each flow: an array of [`Orders`], shared by mmap(2).
pub const ORDERS: &str = "ORDERS";
/// What the kernel says of each flow: an array of [`Progress`], shared by mmap(2).
pub const PROGRESS: &str = "PROGRESS";
/// The global that holds a [`SocketLayout`].
pub const SOCKET_LAYOUT: &str = "SOCKET_LAYOUT";

/// All of them.
pub const MAPS: [&str; 8] = [
    ENROL_LISTENERS,
    ENROLLED,
    CLIENT_SOCKETS,
    UPLINK_SOCKETS,
    UPLINK_TAGS,
    FLOWS,
    ORDERS,
    PROGRESS,
];

/// Flows that can be latched at once.
pub const MOST_FLOWS: u32 = 8192;
/// Most addresses whose clients are enrolled.
pub const MOST_LISTENERS: u32 = 1024;
/// Checkpoints a flow keeps; its limit of messages in flight is so many strides.
pub const CHECKPOINTS: u64 = 8;
/// Flag of a listener: blocking clients are enrolled too, because the route asks for it.
pub const ANY_CLIENT: u64 = 1;
/// Flag of an enrolled client: it has sent on a socket that is [unfit](Sent::unfit), before it had a flow.
pub const TURNED_UNFIT: u64 = 2;
/// Flag of an enrolled client: it has sent something.
pub const HAS_SPOKEN: u64 = 4;
/// Flag of an enrolled client: it has gone on after that.
pub const STAYS: u64 = 8;
/// A message of so many bytes is one of a client that sends a lot.
pub const LARGE_MESSAGE: u64 = 16 * 1024;
/// Of the send buffer of C, as the kernel counts it, the share that bytes take. The rest is what they cost
/// beside, and room for what is forwarded.
pub const SHARE_OF_BYTES: u64 = 3;

/// A listen address of one network namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerKey {
    /// The cookie of the namespace (SO_NETNS_COOKIE).
    pub netns: u64,
    pub address: [u32; 4],
    pub port: u32,
    pub _zero: u32,
}

/// The two ends of the connection of A, as A sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tuple {
    pub client: [u32; 4],
    pub listener: [u32; 4],
    pub client_port: u32,
    pub listener_port: u32,
}

/// What user space says of a flow.
#[repr(C, align(128))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Orders {
    pub tuple: Tuple,
    /// [`ANY_CLIENT`], or 0: hand back a socket that has turned blocking.
    pub flags: u64,
    /// Messages between two checkpoints.
    pub stride: u64,
    /// Whose acknowledgements are followed; 0 while there is no flow.
    pub id: u64,
    /// The flow's id while bytes may be redirected, and 0 otherwise.
    pub armed: u64,
    /// Bytes that A sent natively and C has accepted.
    pub forwarded: u64,
    /// Bytes that C had accepted before the first of A.
    pub base: u64,
    /// Bytes that C may hold without an acknowledgement, if its send buffer is large enough.
    pub budget: u64,
}

/// What the kernel says of a flow. Before it begins, user space clears it and says what has come back so far.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// By [`UPLINK`].
    pub sent: Sent,
    /// By [`ENROL`], on whichever CPU takes the upstream's packets.
    pub received: Received,
}

/// What has become of what A sent.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    /// Bytes redirected to C.
    pub redirected: u64,
    /// Messages redirected to C.
    pub messages: u64,
    /// Not 0 once A has sent on a socket that is blocking, or wants completions of MSG_ZEROCOPY.
    pub unfit: u64,
    /// Not 0 once A has sent a [large](LARGE_MESSAGE) message.
    pub has_large: u64,
    pub _pad: [u64; 4],
    /// Where in the stream every so many messages began.
    pub checkpoints: [u64; CHECKPOINTS as usize],
}

/// What has come back from the upstream.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Received {
    /// Bytes of C that are acknowledged, as its `bytes_acked` counts them.
    pub acked: u64,
    /// The size of its send buffer, which grows with what the path can carry.
    pub buffer: u64,
}

/// Where this kernel keeps what the programs read of a socket: offsets in bytes, from its BTF.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SocketLayout {
    /// In `struct tcp_sock`.
    pub write_seq: u64,
    pub snd_una: u64,
    pub bytes_acked: u64,
    pub sk_socket: u64,
    pub sk_flags: u64,
    pub sk_sndbuf: u64,
    /// In `struct socket`.
    pub file: u64,
    /// In `struct file`.
    pub f_flags: u64,
    /// Not an offset: the number of the bit `SOCK_ZEROCOPY` of `sk_flags`.
    pub zerocopy: u64,
    /// In `struct tcp_sock`: the operations of its upper-layer protocol.
    pub ulp: u64,
}

/// The place of a flow in [`ORDERS`] and [`PROGRESS`]. Ids are not used twice, places are.
#[must_use]
pub const fn place(id: u64) -> u32 {
    (id & 0xffff_ffff) as u32
}

/// The id of the flow that takes a place for the `generation`th time, counted from 1.
#[must_use]
pub const fn id(generation: u64, place: u32) -> u64 {
    generation << 32 | place as u64
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<ListenerKey>() == 32);
    assert!(offset_of!(ListenerKey, address) == 8);
    assert!(offset_of!(ListenerKey, port) == 24);
    assert!(size_of::<Tuple>() == 40);
    assert!(offset_of!(Tuple, client_port) == 32);
    assert!(size_of::<Orders>() == 128);
    assert!(offset_of!(Orders, id) == 56);
    assert!(offset_of!(Orders, budget) == 88);
    assert!(size_of::<Progress>() == 192);
    assert!(offset_of!(Progress, received) == 128);
    assert!(offset_of!(Sent, checkpoints) == 64);
    assert!(size_of::<SocketLayout>() == 80);
};

// SAFETY: `repr(C)`, integers only, and no padding, as the sizes asserted above add up.
#[cfg(not(target_arch = "bpf"))]
unsafe impl aya::Pod for ListenerKey {}
// SAFETY: as above.
#[cfg(not(target_arch = "bpf"))]
unsafe impl aya::Pod for Tuple {}
// SAFETY: as above.
#[cfg(not(target_arch = "bpf"))]
unsafe impl aya::Pod for SocketLayout {}

//! What the programs read of a TCP socket that no context shows: through BTF pointers, at the offsets
//! that user space found in the BTF of this kernel.

use core::ptr::NonNull;

use ambassador_ebpf::sockmap::SocketLayout;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::generated::bpf_skc_to_tcp_sock;

use crate::maps::sockmap::SOCKET_LAYOUT;

const O_NONBLOCK: u32 = 0o4000;

/// A `struct tcp_sock` of the kernel.
pub(crate) struct TcpSocket {
    at: NonNull<u8>,
    layout: SocketLayout,
}

impl TcpSocket {
    /// That of a context's `sk`, if it is a whole and plain TCP socket, and user space knew the layout.
    ///
    /// With an upper-layer protocol it is none: of one that encrypts in the kernel (kTLS) a program sees,
    /// and would redirect, what is not encrypted yet.
    pub(crate) fn of(socket: *mut bpf_sock) -> Option<Self> {
        let (socket, layout) = (NonNull::new(socket)?, SOCKET_LAYOUT.load());
        if layout.write_seq == 0 {
            return None;
        }
        // SAFETY: the helper takes any socket, and answers null where it is not one of TCP.
        let at = unsafe { bpf_skc_to_tcp_sock(socket.as_ptr().cast()) };
        let socket = Self { at: NonNull::new(at.cast())?, layout };
        socket.read::<*const u8>(layout.ulp).is_null().then_some(socket)
    }

    /// Bytes that were ever queued on this socket to be sent, data in the SYN included.
    pub(crate) fn bytes_sent(&self) -> u64 {
        let write_seq: u32 = self.read(self.layout.write_seq);
        let snd_una: u32 = self.read(self.layout.snd_una);
        let acked: u64 = self.read(self.layout.bytes_acked);
        // The acknowledgement of the SYN counts as one.
        acked.wrapping_add(u64::from(write_seq.wrapping_sub(snd_una))).wrapping_sub(1)
    }

    /// What its send buffer may hold, as the kernel counts it.
    pub(crate) fn send_buffer(&self) -> u64 {
        let size: u32 = self.read(self.layout.sk_sndbuf);
        u64::from(size)
    }

    /// Whether its descriptor is non-blocking and it wants no completions of MSG_ZEROCOPY: to other apps
    /// an enrolled socket is not quite an ordinary one.
    pub(crate) fn is_fit(&self) -> bool {
        if self.wants_completions() {
            return false;
        }
        let socket: *const u8 = self.read(self.layout.sk_socket);
        let Some(file) = follow(socket, self.layout.file) else { return false };
        let Some(flags) = follow::<u32>(file, self.layout.f_flags) else { return false };
        flags & O_NONBLOCK != 0
    }

    /// Whether SO_ZEROCOPY is set.
    pub(crate) fn wants_completions(&self) -> bool {
        let flags: u64 = self.read(self.layout.sk_flags);
        flags >> self.layout.zerocopy & 1 != 0
    }

    fn read<T>(&self, offset: u64) -> T {
        read(self.at.as_ptr(), offset)
    }
}

fn follow<T>(base: *const u8, offset: u64) -> Option<T> {
    (!base.is_null()).then(|| read(base, offset))
}

fn read<T>(base: *const u8, offset: u64) -> T {
    let field = base.wrapping_add(offset as usize).cast::<T>();
    // SAFETY: the verifier holds the offset against the type that it knows to be there, and the kernel
    // answers with zeros where a pointer has become stale.
    unsafe { field.read_volatile() }
}

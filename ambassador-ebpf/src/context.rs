//! What contexts tell of a socket and its connection.

use core::arch::asm;
use core::mem::offset_of;
use core::ptr::NonNull;

use ambassador_ebpf::Address;
use ambassador_ebpf::sockmap::Tuple;
use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{bpf_sock, bpf_sock_ops, sk_msg_md};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::bpf_sk_storage_get;
use aya_ebpf::programs::{SkMsgContext, SockOpsContext};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

macro_rules! tuple_of {
    ($context:expr, $type:ty) => {{
        let context = $context.as_ptr().cast::<u8>().cast_const();
        macro_rules! word {
            ($field:ident) => {
                word::<{ offset_of!($type, $field) }>(context)
            };
        }
        macro_rules! words {
            ($field:ident) => {
                [
                    word::<{ offset_of!($type, $field) }>(context),
                    word::<{ offset_of!($type, $field) + 4 }>(context),
                    word::<{ offset_of!($type, $field) + 8 }>(context),
                    word::<{ offset_of!($type, $field) + 12 }>(context),
                ]
            };
        }
        let (client, listener) = match word!(family) {
            AF_INET => (mapped(word!(local_ip4)), mapped(word!(remote_ip4))),
            AF_INET6 => (words!(local_ip6), words!(remote_ip6)),
            _ => return None,
        };
        Some(Tuple {
            client,
            listener,
            client_port: word!(local_port),
            listener_port: u32::from_be(word!(remote_port)),
        })
    }};
}

/// Both ends of the connection that a message is sent on.
pub(crate) fn message_tuple(ctx: &SkMsgContext) -> Option<Tuple> {
    tuple_of!(ctx, sk_msg_md)
}

/// Both ends of the connection that an event is about.
pub(crate) fn event_tuple(ctx: &SockOpsContext) -> Option<Tuple> {
    tuple_of!(ctx, bpf_sock_ops)
}

/// The socket that a message is sent on.
pub(crate) fn message_socket(ctx: &SkMsgContext) -> *mut bpf_sock {
    // SAFETY: the context is alive, and this is one of its fields.
    let field = unsafe { (*ctx.msg).__bindgen_anon_3 };
    // SAFETY: the union has no other field.
    unsafe { field.sk }
}

/// The socket that an event is about.
pub(crate) fn event_socket(ctx: &SockOpsContext) -> *mut bpf_sock {
    // SAFETY: the context is alive, and this is one of its fields.
    let field = unsafe { (*ctx.ops).__bindgen_anon_2 };
    // SAFETY: the union has no other field.
    unsafe { field.sk }
}

/// What a map keeps for the socket that an event is about, if anything.
#[inline(always)]
pub(crate) fn event_storage<T>(ctx: &SockOpsContext, map: &SkStorage<T>) -> Option<NonNull<T>> {
    let socket = event_socket(ctx);
    if socket.is_null() {
        return None;
    }
    let map = core::ptr::from_ref(map).cast_mut().cast();
    // SAFETY: the helper takes this map and this socket; nothing is created.
    let value = unsafe { bpf_sk_storage_get(map, socket.cast(), core::ptr::null_mut(), 0) };
    NonNull::new(value.cast())
}

/// One word of a context. The compiler would join the loads of both families into one at a variable
/// offset, and the verifier: "dereference of modified ctx ptr R9 off=24 disallowed".
fn word<const OFFSET: usize>(context: *const u8) -> u32 {
    let word: u64;
    // SAFETY: the context is alive, and there is a word of it at the offset.
    unsafe {
        asm!(
            "{word} = *(u32 *)({context} + {offset})",
            word = out(reg) word,
            context = in(reg) context,
            offset = const OFFSET,
            options(nostack, readonly),
        );
    }
    word as u32
}

/// `::ffff:a.b.c.d` of an address in network order.
fn mapped(ipv4: u32) -> [u32; 4] {
    Address::v4(ipv4, 0).ip
}

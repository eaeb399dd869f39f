//! The kernel half: one eBPF object, and the list of its hooks.
//!
//! | hook | file | does |
//! |---|---|---|
//! | cgroup/connect4, connect6 | `direct.rs` | makes the app's own socket the upstream connection |
//! | cgroup/getpeername4, getpeername6 | `direct.rs` | shows the app the address it asked for |
//! | sock_ops | `lifecycle.rs` | counts redirected connections, and tells their ends |
//! | sock_ops | `enrol.rs` | enrols the sockets of clients for `uplink`, follows acknowledgements |
//! | sk_msg | `uplink.rs` | passes what a client sends on to its upstream's socket |
//!
//! For any target but BPF this is an empty program, so that the workspace builds everywhere.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod allowance;
#[cfg(target_arch = "bpf")]
mod balance;
#[cfg(target_arch = "bpf")]
mod clock;
#[cfg(target_arch = "bpf")]
mod context;
#[cfg(target_arch = "bpf")]
mod counter;
#[cfg(target_arch = "bpf")]
mod direct;
#[cfg(target_arch = "bpf")]
mod enrol;
#[cfg(target_arch = "bpf")]
mod lifecycle;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod rarely;
#[cfg(target_arch = "bpf")]
mod tcp;
#[cfg(target_arch = "bpf")]
mod uplink;
#[cfg(target_arch = "bpf")]
mod volatile;

/// The kernel reads this to decide which helpers the programs may call.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Required by the compiler. Should a panic ever be reachable, the endless loop makes the
/// verifier refuse the object, where `unreachable_unchecked` would make it run wild.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}

//! What this build is, and what it contains.

use crate::datapath;

/// One fact a line.
pub fn text() -> String {
    let kernel_half = match datapath::object() {
        Some(object) => format!("eBPF object {}", object.sha256),
        None => "no kernel tiers (built without the eBPF object)".to_owned(),
    };
    format!("ambassador {}\n{kernel_half}\n", env!("CARGO_PKG_VERSION"))
}

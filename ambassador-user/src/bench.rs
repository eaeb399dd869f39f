//! What the tiers reach on this node.

pub mod latency;
pub mod load;
pub mod pattern;
pub mod progress;
pub mod summary;
pub mod table;
pub mod upstream;

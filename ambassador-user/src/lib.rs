//! stand-in
pub mod datapath;

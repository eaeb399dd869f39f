//! The user half of ambassador.
//!
//! # Layout
//!
//! *Edge*, for people and probes: [`cli`], [`admin`], [`status`], [`telemetry`], and the commands.
//! *Control*, what should be true: [`config`], [`route`], [`upstream`], [`tier`], [`drain`], [`daemon`].
//! *Data*, the bytes: [`proxy`]. It imports neither the edge nor the kernel tiers.

pub mod admin;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod datapath;
pub mod drain;
pub mod metrics;
pub mod privileges;
pub mod process;
pub mod proxy;
pub mod route;
pub mod status;
pub mod telemetry;
pub mod throttle;
pub mod tier;
pub mod upstream;

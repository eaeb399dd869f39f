//! The user half of ambassador.
//!
//! # Layout
//!
//! *Edge*, for people and probes: [`cli`] and one module per command; [`admin`], [`status`],
//! [`metrics`], [`sockets`], [`telemetry`].
//! *Control*, what should be true: [`config`], [`reload`], [`listeners`], [`route`], [`upstream`], [`tier`],
//! [`room`], [`drain`], and [`daemon`], which brings everything up and down.
//! *Data*, the bytes: [`proxy`], which knows nothing of the kernel tiers; [`datapath`], which is the
//! kernel tiers and the only module that knows aya.

pub mod cli;
pub mod commands;

pub mod bench;
pub mod check;
pub mod doctor;
pub mod exec;
pub mod manifest;
pub mod probe;
pub mod remote;
pub mod version;
pub mod wait;

pub mod daemon;

pub mod admin;
pub mod metrics;
pub mod process;
pub mod service;
pub mod sockets;
pub mod status;
pub mod telemetry;
pub mod tending;

pub mod config;
pub mod direct;
pub mod drain;
pub mod listeners;
pub mod privileges;
pub mod reload;
pub mod room;
pub mod route;
pub mod throttle;
pub mod tier;
pub mod upstream;

pub mod datapath;
pub mod proxy;

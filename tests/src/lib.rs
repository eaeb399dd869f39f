//! What the behaviour tests share: pods made of namespaces and cgroups, real servers, and a
//! way to say that a test cannot run here.
//!
//! # Layout
//! - Waiting and doubt: [`wait`], [`skip`], [`noise`].
//! - Where things run: [`place`], [`pod`], [`cgroup`], [`process`] and its [`family`], real containers by
//!   [`podman`], and a [`kernel`] that is watched.
//! - The product under test: [`ambassador`], seen through [`http`], [`metrics`] and its [`pins`], the [`way`]
//!   a test's connections take, and the simplest case of it, a [`front`].
//! - Whoever else is in the kernel: a [`stranger`].
//! - The other ends: [`peer`]s at an [`address`], their [`readiness`] and [`conversation`]s, an [`echo`], real
//!   [`server`]s, and a [`pool`] of clients.

pub mod address;
pub mod ambassador;
pub mod cgroup;
pub mod conversation;
pub mod echo;
pub mod family;
pub mod front;
pub mod http;
pub mod kernel;
pub mod metrics;
pub mod noise;
pub mod peer;
pub mod pins;
pub mod place;
pub mod pod;
pub mod podman;
pub mod pool;
pub mod process;
pub mod readiness;
pub mod server;
pub mod skip;
pub mod stranger;
pub mod wait;
pub mod way;

//! What the behaviour tests share: pods made of namespaces and cgroups, real servers, and a
//! way to say that a test cannot run here.

pub mod skip;

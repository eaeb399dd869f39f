//! Probes for images that have no shell: does the service answer?

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use crate::config::{self, Balance, Target};
use crate::proxy::connect::{As, connect};
use crate::upstream::Upstream;
use crate::upstream::balance::Source;
use crate::upstream::dns::Names;

/// Whether `target` accepts a connection, by the way that an app's would take.
pub fn tcp(target: Target, timeout: Duration) -> Result<()> {
    let mut names = Names::default();
    let upstream = config::Upstream {
        name: Arc::from("probe"),
        endpoints: vec![config::Endpoint { target, weight: std::num::NonZeroU16::MIN }],
        balance: Balance::default(),
        connect: config::Connect { timeout, ..Default::default() },
        dns: config::Dns::default(),
        health: None,
        eject: None,
    };
    let upstream = Upstream::new(&Arc::new(upstream), None, &mut names);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        names.ask_for(std::iter::once(&*upstream));
        connect(&upstream, &As::App, &Source::Pod).await.map(drop)
    })
}

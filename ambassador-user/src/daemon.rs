//! The ambassador in service: bind everything, drop privileges, serve, drain.

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};
use tracing::{error, info, warn};

use crate::admin::{control, http};
use crate::config::{self, Config, Control, Listen, Tier};
use crate::datapath::kernel::{self, Hold, Kernel};
use crate::direct::Direct;
use crate::drain::{self, Phase, Trigger};
use crate::metrics::Metrics;
use crate::privileges;
use crate::process;
use crate::proxy::connection::Connections;
use crate::proxy::listener::{self, Bound};
use crate::proxy::shortcut::Shortcuts;
use crate::proxy::{self, Shared};
use crate::route::Route;
use crate::service::{Order, Service};
use crate::telemetry::{LogLevel, Telemetry};
use crate::tier::{Ladder, REQUIRED_TIER_MISSING, SOCKMAP_IS_NOTICED};
use crate::upstream::Upstream;
use crate::upstream::dns::Names;

/// Only the owner may change state.
const CONTROL_MODE: u32 = 0o600;
/// How long cut connections may take to be gone; they wait for nobody.
const CUT: Duration = Duration::from_secs(1);

/// Everything bound and nothing running: clients can connect, and wait.
struct Bindings {
    routes: Vec<Vec<Bound>>,
    http: Option<Bound>,
    control: Option<Bound>,
}

/// Runs until told to end. An error is one of the start; afterwards there is only the exit code.
pub fn run(config: &Config, telemetry: &Telemetry) -> Result<ExitCode> {
    let kernel = open_kernel(config);
    let ladder = Ladder::probe(kernel_tiers(&kernel));
    let kernel = kernel.ok();
    if let Err(shortfall) = ladder.satisfies(config) {
        error!("{shortfall:#}");
        return Ok(ExitCode::from(REQUIRED_TIER_MISSING));
    }
    raise_limits(config);
    let bindings = Bindings::new(config)?;
    privileges::drop_all(kernel.is_some())?;
    // Threads start here, and take over what their starter may do.
    telemetry.write_from_a_thread();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut runtime = match threads {
        // One thread needs no work stealing and no locks that anybody contends for.
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime.enable_all().build().context("start the runtime")?;
    let code = runtime.block_on(serve(config, bindings, ladder, kernel, telemetry.level()));
    // A lookup may be under way; nobody waits for it.
    runtime.shutdown_background();
    code
}

/// The kernel half, if a route can use it, or if an ambassador before this one left it: that would go on
/// by the routes of then. Or why there is none.
fn open_kernel(config: &Config) -> Result<Kernel, String> {
    let all_work = Ladder::default();
    let used = config.routes.iter().any(|it| all_work.choose(it, it.tier).tier >= Tier::Sockmap);
    if !used && !kernel::is_pinned(&config.acceleration) {
        return Err("no route can use it".to_owned());
    }
    let routes = u32::try_from(config.routes.len()).unwrap_or(u32::MAX);
    Kernel::open(&config.acceleration, routes).map_err(|obstacle| obstacle.to_string())
}

/// What of the kernel tiers works with that.
fn kernel_tiers(kernel: &Result<Kernel, String>) -> Ladder {
    match kernel {
        Ok(kernel) => Ladder {
            no_sockmap: kernel.sockmap.as_ref().err().cloned(),
            no_sockmap_unasked: kernel.sockmap_is_noticed.then(|| SOCKMAP_IS_NOTICED.to_owned()),
            ..Ladder::default()
        },
        Err(why) => Ladder {
            no_direct: Some(why.clone()),
            no_sockmap: Some(why.clone()),
            ..Ladder::default()
        },
    }
}

impl Bindings {
    fn new(config: &Config) -> Result<Self> {
        let http = match config.admin.http {
            None => None,
            Some(address) => listener::bind(&Listen::Tcp { address, if_available: false }, 0)
                .context("admin.http")?,
        };
        let control = match &config.admin.control {
            Control::Off => None,
            Control::At(path) => listener::bind(&Listen::Unix(path.clone()), CONTROL_MODE)
                .context("admin.control")?,
            Control::IfPossible(path) => listener::bind(&Listen::Unix(path.clone()), CONTROL_MODE)
                .unwrap_or_else(|error| {
                    info!("no control socket: {error:#} (say where with --control unix:PATH)");
                    None
                }),
        };
        let routes = config.routes.iter().map(|route| {
            let bound = route.listen.iter().map(|listen| listener::bind(listen, route.socket_mode));
            bound
                .filter_map(Result::transpose)
                .collect::<Result<Vec<_>>>()
                .with_context(|| format!("route {}", route.name))
        });
        Ok(Self { routes: routes.collect::<Result<_>>()?, http, control })
    }
}

async fn serve(
    config: &Config,
    bindings: Bindings,
    ladder: Ladder,
    kernel: Option<Kernel>,
    log_level: LogLevel,
) -> Result<ExitCode> {
    let (orders, given_orders) = mpsc::channel(4);
    let stops = Stops::new(given_orders)?;
    let (trigger, drain) = drain::channel();
    let metrics = Metrics::default();
    let mut names = Names::default();
    // Routes to one upstream share it, and with it the counts that balancing goes by.
    let mut upstreams: HashMap<_, Arc<Upstream>> = HashMap::new();
    let routes = config.routes.iter().map(|meant| {
        let upstream = upstreams
            .entry(Arc::as_ptr(&meant.upstream))
            .or_insert_with(|| Upstream::new(&meant.upstream, &mut names));
        Route::new(meant, Arc::clone(upstream), &ladder, &metrics)
    });
    let routes = routes.collect::<Vec<_>>();
    let changes = names.watch();
    let (direct, sockmap, mut hold) = match kernel {
        None => (None, None, None),
        Some(Kernel { tables, ends, sockmap, messages, hold, .. }) => {
            messages.map(|messages| tokio::spawn(messages.pass_on()));
            let stale_after = config.acceleration.stale_after;
            let direct = Direct::start(tables, ends, &routes, changes, stale_after, &metrics)
                .context("write the kernel's tables")?;
            (Some(direct), sockmap.ok().map(Arc::new), Some(hold))
        }
    };
    let shortcuts = sockmap.clone().map(|sockmap| sockmap as Arc<dyn Shortcuts>);
    let shared = Shared { shortcuts, ..Shared::default() };
    let service = Arc::new(Service {
        routes,
        ladder,
        direct,
        sockmap,
        connections: Arc::clone(&shared.connections),
        metrics,
        drain: drain.clone(),
        started: Instant::now(),
    });

    service.enrol().context("have clients enrolled")?;
    let mut accepting = JoinSet::new();
    for (route, bound) in service.routes.iter().zip(bindings.routes) {
        for bound in bound {
            info!(route = %route.name, tier = %route.choice().tier, upstream = %route.upstream.name, "listening on {bound}");
            let listener = bound.listen().context("register a listener with the runtime")?;
            accepting.spawn(proxy::serve(
                Arc::clone(route),
                listener,
                shared.clone(),
                drain.clone(),
            ));
        }
    }
    // These two end with the process: they answer during the drain too.
    if let Some(bound) = bindings.http {
        info!("probes and metrics on http://{bound}");
        let listener = bound.listen().context("register admin.http with the runtime")?;
        tokio::spawn(http::serve(listener, Arc::clone(&service)));
    }
    if let Some(bound) = bindings.control {
        info!("control socket at {bound}");
        let listener = bound.listen().context("register admin.control with the runtime")?;
        let handler = control::Handler { service: Arc::clone(&service), orders, log_level };
        tokio::spawn(control::serve(listener, handler));
    }
    if let Some(hold) = &mut hold {
        hold.outlive().context("pin the kernel half")?;
    }
    info!(routes = config.routes.len(), "ready");
    let code = end(config.drain, &service, trigger, accepting, stops, &hold).await;
    if let Some(hold) = hold {
        hold.release().context("take the kernel half back")?;
    }
    Ok(code)
}

/// Waits for the first reason to stop, and then ends in order.
async fn end(
    policy: config::Drain,
    service: &Service,
    trigger: Trigger,
    mut accepting: JoinSet<()>,
    mut stops: Stops,
    hold: &Option<Hold>,
) -> ExitCode {
    let connections = &service.connections;
    // New connections end with the accepting of new connections, in the kernel as here; unless what does
    // it stays for the next ambassador.
    let stop_redirecting = || {
        if let (Some(direct), Some(hold)) = (&service.direct, hold)
            && !hold.stays()
            && let Err(error) = direct.close()
        {
            warn!("cannot close the kernel's tables: {error:#}");
        }
    };
    if stops.next().await == Stop::Order(Order::Shutdown) {
        accepting.abort_all();
        stop_redirecting();
        return cut(connections, "told to shut down").await;
    }
    let begun = tokio::time::Instant::now();
    info!(
        grace = %humantime::format_duration(policy.grace),
        deadline = %humantime::format_duration(policy.deadline),
        connections = connections.count(),
        "draining"
    );
    trigger.advance(Phase::Grace);
    let in_order = async {
        sleep_until(begun + policy.grace).await;
        stop_redirecting();
        trigger.advance(Phase::Finishing);
        while accepting.join_next().await.is_some() {}
        connections.ended().await;
    };
    tokio::select! {
        () = in_order => {
            info!("drained");
            ExitCode::SUCCESS
        }
        () = sleep_until(begun + policy.deadline) => cut(connections, "the drain's deadline").await,
        () = stops.impatient() => cut(connections, "told again to end").await,
    }
}

/// Ends what is left. A cut connection is a failure, and none to cut is not.
async fn cut(connections: &Connections, why: &str) -> ExitCode {
    let cut = connections.cut();
    // Bounded, though tasks that are aborted wait for nothing.
    let _ = timeout(CUT, connections.ended()).await;
    if cut == 0 {
        info!("ended: {why}");
        return ExitCode::SUCCESS;
    }
    warn!(connections = cut, "cut: {why}");
    ExitCode::FAILURE
}

/// Everything that can tell the process to end.
struct Stops {
    terminate: Signal,
    interrupt: Signal,
    orders: mpsc::Receiver<Order>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    Signal,
    Order(Order),
}

impl Stops {
    fn new(orders: mpsc::Receiver<Order>) -> Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("watch for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("watch for SIGINT")?,
            orders,
        })
    }

    async fn next(&mut self) -> Stop {
        tokio::select! {
            _ = self.terminate.recv() => Stop::Signal,
            _ = self.interrupt.recv() => Stop::Signal,
            Some(order) = self.orders.recv() => Stop::Order(order),
        }
    }

    /// Resolves when a drain under way is to be cut short. To ask for a drain again is not that.
    async fn impatient(&mut self) {
        while self.next().await == Stop::Order(Order::Drain) {}
    }
}

/// A connection takes two descriptors and a pipe's share.
fn raise_limits(config: &Config) {
    let wanted: u64 =
        config.routes.iter().map(|route| 2 * u64::from(route.max_connections.get())).sum();
    match process::raise_open_file_limit() {
        Ok(limit) if wanted > limit => info!(
            "{limit} open files are allowed, which is {} connections; max_connections of all routes \
             is {}",
            limit / 2,
            wanted / 2
        ),
        Ok(_) => {}
        Err(error) => warn!("cannot raise the limit of open files: {error}"),
    }
}

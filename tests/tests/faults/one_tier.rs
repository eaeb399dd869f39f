//! One of the kernel tiers cannot be had: the other one carries what it can, and each says its own reason.

use super::*;

/// Says what it has heard, without blocking.
const TALKATIVE: &str = "
import asyncio, sys
async def talk():
    hearing, saying = await asyncio.open_connection('127.0.0.1', int(sys.argv[1]))
    while heard := await hearing.read(1):
        saying.write(heard)
asyncio.run(talk())
";

/// Apps are asked for by a program that does not share: nothing can be redirected there.
#[test]
fn sockmap_carries_where_the_connect_hooks_cannot_be_attached() -> Result<()> {
    needs!(Sockmap);
    installed!("bpftool", "python3");
    let (other, mut scene, theirs) = (Scene::new()?, Scene::new()?, Cgroup::new()?);
    let _theirs = other.launch()?.cgroup(theirs.path()).flag("--require", "direct").start()?;
    let below = Cgroup::new()?;
    attach_of(&theirs, &below, false)?;
    scene.cgroup = below.path().to_owned();
    let ambassador = scene.vouched()?.start()?;
    is_explained(&ambassador, "direct: not used: ", "attach connect4 to the cgroup")?;

    let mut app = Command::new("python3");
    app.args(["-c", TALKATIVE, &scene.route.port()?.to_string()]);
    below.start_in(&mut app)?;
    let app = Process::start(&mut app)?;
    until_true("the shortcut", || Ok(ambassador.tiers()? == ["sockmap"]))?;
    drop(app);
    ambassador.end()
}

/// What was pinned without redirection is taken over as it is by whoever may not load, and replaced by whoever may.
#[test]
fn sockmap_carries_where_redirection_fails_its_self_test() -> Result<()> {
    needs!(Sockmap);
    let scene = Scene::new()?;
    // If it sets IPV6_V6ONLY: EPERM.
    let filter = filtered!(
        libc::SYS_setsockopt,
        "[(0x20, 0, 0, 0), (0x15, 0, 5, int(sys.argv[1])), (0x20, 0, 0, 24), (0x15, 0, 3, 41), (0x20, 0, 0, 32), (0x15, 0, 1, 26), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7fff0000)]"
    );
    let ambassador = scene.vouched()?.under(&filter).start()?;
    scene.is_carried_by(&ambassador, "sockmap")?;
    let why = "Operation not permitted";
    is_explained(&ambassador, "direct: not used: ", why)?;
    kill(ambassador)?;

    let unprivileged = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", "--"];
    let ambassador = scene.vouched()?.under(&unprivileged).start()?;
    scene.is_carried_by(&ambassador, "sockmap")?;
    is_explained(&ambassador, "direct: not used: ", "not among what was pinned")?;
    kill(ambassador)?;

    let ambassador = scene.vouched()?.start()?;
    scene.is_carried_by(&ambassador, "direct")?;
    ambassador.end()
}

#[test]
fn direct_carries_where_sockets_may_not_be_read_and_sockmap_says_what_to_grant() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let caps = ["setpriv", "--inh-caps=-all", "--bounding-set=-all,+bpf,+net_admin", "--"];
    let ambassador = scene.vouched()?.under(&caps).start()?;
    scene.is_carried_by(&ambassador, "direct")?;
    ambassador.end()?;

    let launch = scene.launch()?.cgroup(&scene.cgroup).flag("--tier", "sockmap");
    let ambassador = launch.under(&caps).start()?;
    scene.is_carried_by(&ambassador, "splice")?;
    is_explained(&ambassador, "sockmap: not used: ", "grant CAP_PERFMON")?;
    ambassador.end()
}

#[test]
fn connections_that_the_sockmap_tier_has_no_room_for_are_relayed() -> Result<()> {
    needs!(Sockmap);
    installed!("bpftool");
    let scene = Scene::new()?;
    let ambassador = scene.launch()?.in_kernel("sockmap")?.start()?;
    scene.is_carried_by(&ambassador, "sockmap")?;
    scene.fill("FLOWS", 40, 8, 8 * 1024)?;
    for _ in 0..3 {
        scene.is_carried_by(&ambassador, "splice")?;
    }
    ambassador.end()
}

impl Scene {
    /// One whose clients are said to be fit for `sockmap`.
    fn vouched(&self) -> Result<Launch> {
        let config = format!(
            "version: 1
routes: [{{ name: routed, listen: '{}', upstream: u, clients: nonblocking }}]
upstreams: {{ u: {{ endpoints: ['{}'] }} }}
",
            self.route,
            self.echo.address()
        );
        let launch = Launch::new(&self.place)?.flag("--instance", INSTANCE).cgroup(&self.cgroup);
        launch.config(&config)
    }

    fn is_carried_by(&self, ambassador: &Ambassador, tier: &str) -> Result<()> {
        let client = self.route.connect_without_blocking()?;
        ensure!(client.hear(1)? == b"e");
        // Who goes on gets a shortcut.
        (0..8).try_for_each(|_| client.ask(b"hello", b"hello"))?;
        ensure!(ambassador.tiers()? == [tier], "{:?}", ambassador.tiers()?);
        drop(client);
        until_true("the end of the connection", || Ok(ambassador.tiers()?.is_empty()))
    }
}

fn is_explained(ambassador: &Ambassador, line: &str, why: &str) -> Result<()> {
    let explained = ambassador.command(&["explain"])?.success()?;
    let mut lines = explained.lines().filter(|it| it.trim_start().starts_with(line));
    ensure!(lines.any(|line| line.contains(why)), "{explained}");
    Ok(())
}

fn kill(ambassador: Ambassador) -> Result<()> {
    ambassador.process.signal(libc::SIGKILL)?;
    ambassador.process.finish(SOON).map(drop)
}

//! Whatever goes wrong with the kernel half ends in a lower tier, or without an extra, with its reason told
//! and traffic flowing; or, where the tier is required, in one line and exit code 77.

mod one_tier;

use std::fmt::Write as _;
use std::iter::repeat;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use ambassador_tests::address::Address;
use ambassador_tests::ambassador::{Ambassador, Launch};
use ambassador_tests::cgroup::{self, Cgroup};
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::place::{BPFFS, Place};
use ambassador_tests::process::{Process, run};
use ambassador_tests::wait::{SOON, until, until_true};
use ambassador_tests::{installed, needs, stranger};

const INSTANCE: &str = "faults";
const TIER_MISSING: i32 = 77;

#[test]
fn each_missing_capability_is_named() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    for (granted, missing) in [
        ("-all", "grant CAP_BPF and CAP_NET_ADMIN"),
        ("-all,+bpf", "grant CAP_NET_ADMIN"),
        ("-all,+net_admin", "grant CAP_BPF"),
    ] {
        let caps = format!("--bounding-set={granted}");
        let under = ["setpriv", "--inh-caps=-all", &caps, "--"];
        scene.is_lower(&under, missing).with_context(|| granted.to_owned())?;
    }
    Ok(())
}

#[test]
fn two_capabilities_are_enough() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let caps = ["setpriv", "--inh-caps=-all", "--bounding-set=-all,+bpf,+net_admin", "--"];
    let ambassador = scene.launch()?.in_kernel("direct")?.under(&caps).start()?;
    let client = greeted(&scene.route, 1)?;
    ensure!(ambassador.tiers()? == ["direct"]);
    drop(client);
    ambassador.end()
}

/// Under a filter of system calls, of this code about the call of this number.
macro_rules! filtered {
    ($call:expr, $code:literal) => {{
        ambassador_tests::installed!("python3");
        [
            "python3",
            "-c",
            concat!(
                "
import ctypes, os, struct, sys
code = ",
                $code,
                "
code = b''.join(struct.pack('HBBI', *line) for line in code)
held = ctypes.create_string_buffer(code)
filter = struct.pack('HxxxxxxQ', len(code) // 8, ctypes.addressof(held))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filter): raise OSError(ctypes.get_errno())
os.execvp(sys.argv[2], sys.argv[2:])
"
            ),
            &$call.to_string(),
        ]
    }};
}
pub(crate) use filtered;

#[test]
fn a_seccomp_profile_that_forbids_bpf_is_suspected() -> Result<()> {
    needs!(Direct);
    // Loads the number of a call; if it is this one, EPERM; else goes on.
    let filter = filtered!(
        libc::SYS_bpf,
        "[(0x20, 0, 0, 0), (0x15, 0, 1, int(sys.argv[1])), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7fff0000)]"
    );
    Scene::new()?.is_lower(&filter, "or a seccomp profile the system call")
}

#[test]
fn programs_that_the_kernel_rejects_are_enough_for_traffic() -> Result<()> {
    needs!(Direct);
    // The same, if its first argument is BPF_PROG_LOAD: EINVAL.
    let filter = filtered!(
        libc::SYS_bpf,
        "[(0x20, 0, 0, 0), (0x15, 0, 3, int(sys.argv[1])), (0x20, 0, 0, 16), (0x15, 0, 1, 5), (0x06, 0, 0, 0x50016), (0x06, 0, 0, 0x7fff0000)]"
    );
    Scene::new()?.is_lower(&filter, "the kernel refused the programs")
}

#[test]
fn too_few_descriptors_for_the_programs_are_enough_for_traffic() -> Result<()> {
    needs!(Direct);
    Scene::new()?.is_lower(&["prlimit", "--nofile=32:32", "--"], "Too many open files")
}

/// Kernels since 5.11 charge maps to the cgroup, and not to this limit.
#[test]
fn locked_memory_does_not_matter() -> Result<()> {
    needs!(Direct);
    let scene = Scene::new()?;
    let limited = ["prlimit", "--memlock=0:0", "--"];
    let ambassador = scene.launch()?.in_kernel("direct")?.under(&limited).start()?;
    let _client = greeted(&scene.route, 1)?;
    ensure!(ambassador.tiers()? == ["direct"]);
    Ok(())
}

#[test]
fn a_path_that_is_no_cgroup_is_named() -> Result<()> {
    needs!(Direct);
    let mut scene = Scene::new()?;
    let looks_like_one = tempfile::tempdir()?;
    // As version 1 has it.
    std::fs::write(looks_like_one.path().join("cgroup.procs"), "")?;
    for path in [looks_like_one.path(), Path::new("/nowhere")] {
        scene.cgroup = path.to_owned();
        let why =
            format!("{} is not a cgroup v2 directory; name one with --cgroup", path.display());
        scene.is_lower(&[], &why)?;
    }
    Ok(())
}

#[test]
fn a_cgroup_that_goes_takes_redirection_with_it_and_nothing_else() -> Result<()> {
    needs!(Direct);
    let (mut scene, cgroup) = (Scene::new()?, Cgroup::new()?);
    scene.cgroup = cgroup.path().to_owned();
    let ambassador = scene.launch()?.cgroup(cgroup.path()).flag("--require", "direct").start()?;
    let mut app = Command::new("bash");
    // The app's socket is read by its shell: one byte of greeting.
    let port = scene.route.port()?;
    app.args(["-c", &format!("exec 3<>/dev/tcp/127.0.0.1/{port}; read -rN1 -u3; echo \"$REPLY\"")]);
    cgroup.start_in(&mut app)?;
    ensure!(run(&mut app, SOON)? == "e\n");
    until_true("the app's record", || Ok(ambassador.access_records("tier", "direct")?.len() == 1))?;
    drop(cgroup);
    let client = greeted(&scene.route, 1)?;
    ensure!(ambassador.tiers()? == ["splice"]);
    drop(client);
    ambassador.end()
}

#[test]
fn without_a_bpffs_the_programs_end_with_the_process() -> Result<()> {
    needs!(Direct);
    for words in [&["-t", "tmpfs", "tmpfs", BPFFS][..], &["-o", "remount,ro,bind", BPFFS]] {
        let scene = Scene::new()?;
        run(scene.place.command("mount").args(words), SOON)?;
        let ambassador = scene.launch()?.in_kernel("direct")?.start()?;
        let (_, client) = greeted(&scene.route, 1)?;
        ensure!(ambassador.tiers()? == ["direct"]);
        let log = ambassador.log()?;
        let told = log.iter().filter(|line| line.to_string().contains("however that ends"));
        ensure!(told.count() == 1, "{log:?}");
        let left = run(scene.place.command("ls").arg(BPFFS), SOON)?;
        ensure!(!left.contains("ambassador"), "{words:?} left {left}");
        drop(ambassador);
        ensure!(scene.route.connect().is_err(), "redirected by nobody's programs");
        client.ask(b"still there?", b"still there?")?;
    }
    Ok(())
}

#[test]
fn a_program_of_others_that_shares_is_shared_with_and_one_that_does_not_is_named() -> Result<()> {
    needs!(Direct);
    installed!("bpftool");
    let (other, mut scene) = (Scene::new()?, Scene::new()?);
    let theirs = Cgroup::new()?;
    let _theirs = other.launch()?.cgroup(theirs.path()).flag("--require", "direct").start()?;
    for (shares, below) in [(true, Cgroup::new()?), (false, Cgroup::new()?)] {
        attach_of(&theirs, &below, shares)?;
        scene.cgroup = below.path().to_owned();
        if shares {
            scene.launch()?.cgroup(below.path()).flag("--require", "direct").start()?.end()?;
        } else {
            scene.is_lower(&[], "attach connect4 to the cgroup")?;
        }
    }
    Ok(())
}

#[test]
fn ends_that_are_too_many_at_once_are_counted() -> Result<()> {
    needs!(Direct);
    const ENDS: usize = 4000;
    let (here, refusing) = (Place::here(), Scene::new()?);
    let dead = Address::from(SocketAddr::from((Ipv4Addr::LOCALHOST, here.port()?)));
    let launch = Launch::new(&refusing.place)?.in_kernel("direct")?;
    let ambassador = launch.route(format!("routed:{}={dead}", refusing.route)).start()?;
    ambassador.process.signal(libc::SIGSTOP)?;
    for _ in 0..ENDS {
        ensure!(refusing.route.connect().is_err(), "a connection to nobody");
    }
    ambassador.process.signal(libc::SIGCONT)?;
    let untold = until("word of what is untold", SOON, || {
        let log = ambassador.log()?;
        let said = |line: &Value| {
            let words =
                line["message"].as_str()?.split_once(" connections ended without a record")?;
            words.0.parse::<usize>().ok()
        };
        Ok(log.iter().find_map(said))
    })?;
    ensure!(untold > 0);
    until_true("every end to be told or counted", || {
        let ended = ambassador.metrics()?.sum("ambassador_connections_total", &[]);
        Ok(ended == Some((ENDS - untold) as f64))
    })?;
    let status = ambassador.command(&["status", "--json"])?.success()?;
    let status: Value = serde_json::from_str(&status).context("parse the status")?;
    let route = &status["routes"][0];
    let open = (&route["connections"], &route["endpoints"][0]["connections"]);
    ensure!(open == (&0.into(), &0.into()), "{status}");

    drop(ambassador);
    let launch = Launch::new(&refusing.place)?.in_kernel("direct")?;
    let next = launch.route(format!("routed:{}={dead}", refusing.route)).start()?;
    ensure!(refusing.route.connect().is_err(), "a connection to nobody");
    until_true("the record of one more", || {
        Ok(!next.access_records("outcome", "connect_failed")?.is_empty())
    })?;
    let log = next.log()?;
    let told = |line: &&Value| line.to_string().contains("connections ended without a record");
    let told: Vec<_> = log.iter().filter(told).collect();
    let since = format!("{untold} connections ended without a record since the kernel half");
    ensure!(told.len() == 1 && told[0].to_string().contains(&since), "{told:?}");
    Ok(())
}

/// A connection that there is no room for in the list is carried all the same, and told when it ends; the program
/// says so in the log, seldom. One whose target has no room goes to the listener.
#[test]
fn full_maps_are_harmless() -> Result<()> {
    needs!(Direct);
    installed!("bpftool");
    let scene = Scene::new()?;
    let ambassador = scene.launch()?.in_kernel("direct")?.start()?;
    let first = greeted(&scene.route, 1)?.1;
    scene.fill("OPEN", 8, 104, 64 * 1024)?;
    let begun = Instant::now();
    let (_, unlisted) = greeted(&scene.route, 1)?;
    for _ in 0..20 {
        drop(greeted(&scene.route, 1)?);
    }
    let said = || {
        let unlisted =
            |line: &&Value| line.to_string().contains("a connection is not listed: there are too");
        Ok::<_, anyhow::Error>(ambassador.log()?.iter().filter(unlisted).count() as u64)
    };
    until_true("the program's word in the log", || Ok(said()? > 0))?;
    ensure!(said()? <= 1 + begun.elapsed().as_secs(), "it was said {} times", said()?);
    ensure!(ambassador.tiers()? == ["direct"], "{:?}", ambassador.tiers()?);
    let peer = unlisted.socket().local_addr()?.as_socket().context("find an address")?.to_string();
    unlisted.ask(b"hello", b"hello")?;
    drop((first, unlisted));
    let record = until("the record", SOON, || Ok(ambassador.access_records("peer", &peer)?.pop()))?;
    ensure!(record["tier"] == "direct" && record["bytes_up"] == 5, "{record}");
    ambassador.end()?;

    let ambassador = scene.launch()?.in_kernel("direct")?.start()?;
    scene.fill("TARGETS", 32, 56, 16 * 1024)?;
    let client = greeted(&scene.route, 1)?;
    ensure!(ambassador.tiers()? == ["splice"], "{:?}", ambassador.tiers()?);
    drop(client);
    ambassador.end()
}

/// Its programs run after ours, in the cgroup above. What it undoes is what our own are told by.
#[test]
fn a_program_of_others_that_undoes_ours_is_found_out_by_the_self_test() -> Result<()> {
    needs!(Direct);
    let (mut scene, above) = (Scene::new()?, Cgroup::new()?);
    let below = Cgroup::below(above.path())?;
    stranger::silence(above.path())?;
    scene.cgroup = below.path().to_owned();
    scene.is_lower(
        &[],
        "the self-test failed: bytes are counted and the end is told: its end was not told",
    )
}

/// A place with a bpffs of its own, a cgroup, and a route to an echo that greets with one byte.
struct Scene {
    place: Place,
    cgroup: std::path::PathBuf,
    route: Address,
    echo: Echo,
}

impl Scene {
    fn new() -> Result<Self> {
        let place = Place::here().with_bpffs()?;
        let route = SocketAddr::from((Ipv4Addr::LOCALHOST, place.port()?)).into();
        let cgroup = cgroup::of_this_process()?.to_owned();
        Ok(Self { place, cgroup, route, echo: Echo::greeting("e")? })
    }

    fn launch(&self) -> Result<Launch> {
        let launch = Launch::new(&self.place)?.flag("--instance", INSTANCE);
        Ok(launch.route(format!("routed:{}={}", self.route, self.echo.address())))
    }

    /// Expects a lower tier for this reason of an ambassador that is started by this wrapper.
    fn is_lower(&self, wrapper: &[&str], why: &str) -> Result<()> {
        let launch = || Ok::<_, anyhow::Error>(self.launch()?.cgroup(&self.cgroup).under(wrapper));
        let ambassador = launch()?.start()?;
        let client = greeted(&self.route, 1)?;
        ensure!(ambassador.tiers()? == ["splice"], "{:?}", ambassador.tiers()?);
        let explained = ambassador.command(&["explain"])?.success()?;
        let line =
            explained.lines().find(|line| line.trim_start().starts_with("direct: not used: "));
        ensure!(line.is_some_and(|line| line.contains(why)), "{explained}");
        drop(client);
        ambassador.end()?;

        let refused = launch()?.flag("--require", "direct").spawn()?.process.finish(SOON)?;
        let lines: Vec<_> =
            refused.stderr.lines().filter(|line| line.contains("\"ERROR\"")).collect();
        ensure!(refused.code() == Some(TIER_MISSING), "{refused:?}");
        ensure!(lines.len() == 1 && lines[0].contains(why), "{refused:?}");
        let left = run(self.place.command("ls").arg(BPFFS), SOON)?;
        ensure!(!left.contains("ambassador"), "left behind: {left}");
        Ok(())
    }

    /// Fills a pinned map with as many elements, of keys and values of these sizes.
    fn fill(&self, map: &str, key: usize, value: usize, elements: u32) -> Result<()> {
        let pin = format!("{BPFFS}/ambassador/{INSTANCE}/maps/{map}");
        let value = " 00".repeat(value);
        let mut batch = String::new();
        for number in 0..elements {
            write!(batch, "map update pinned {pin} key hex")?;
            let bytes = number.to_le_bytes().into_iter().chain(repeat(0xff)).take(key);
            bytes.for_each(|byte| batch.push_str(&format!(" {byte:02x}")));
            batch.push_str(" value hex");
            batch.push_str(&value);
            batch.push('\n');
        }
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), batch)?;
        let mut filling = self.place.command("bpftool");
        filling.args(["batch", "file"]).arg(file.path());
        // It ends with an error as soon as there is no room.
        Process::start(&mut filling)?.finish(SOON)?;
        Ok(())
    }
}

/// Attaches the connect hook of one cgroup to another one, with or without room for others there.
fn attach_of(one: &Cgroup, other: &Cgroup, shares: bool) -> Result<()> {
    let bpftool = |words: &[&str]| run(Command::new("bpftool").args(words), SOON);
    let shown = bpftool(&["-j", "cgroup", "show", &one.path().to_string_lossy()])?;
    let shown: Value = serde_json::from_str(&shown).context("parse what is attached")?;
    let connect4 = shown
        .as_array()
        .and_then(|all| all.iter().find(|it| it["name"] == "connect4"))
        .context("find connect4")?["id"]
        .to_string();
    let path = other.path().to_string_lossy();
    let mut words = vec!["cgroup", "attach", &path, "cgroup_inet4_connect", "id", &connect4];
    words.extend(shares.then_some("multi"));
    bpftool(&words).map(drop)
}

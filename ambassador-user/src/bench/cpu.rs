//! CPUs: which ones a measurement runs on, and how long a process has had one.

use std::fmt::Display;
use std::fs;
use std::io;
use std::mem;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// The CPU of the pod (clients and proxies) and that of the upstream. One CPU each, because waking
/// an idle virtual CPU costs tens of microseconds and would be most of every round trip.
#[derive(Clone, Copy)]
pub struct Cpus {
    /// Where the clients and the proxy run.
    pub pod: usize,
    /// Where the servers run.
    pub upstream: usize,
}

impl Cpus {
    /// The first two CPUs that this process may use; both the same if there is but one.
    pub fn choose() -> Result<Self> {
        let set = affinity()?;
        let mut allowed = (0..libc::CPU_SETSIZE as usize).filter(|&cpu| contains(&set, cpu));
        let pod = allowed.next().context("find a CPU that may be used")?;
        Ok(Self { pod, upstream: allowed.next().unwrap_or(pod) })
    }
}

/// Binds the calling thread, and what it starts, to one CPU.
pub fn pin(cpu: usize) -> Result<()> {
    // SAFETY: a `cpu_set_t` is a bit array: all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the macro panics if the index is beyond the set, and only changes the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the pointer and the size describe `set`, which the kernel only reads.
    let done = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    ensure!(done == 0, "pin to CPU {cpu}: {}", io::Error::last_os_error());
    Ok(())
}

/// Seconds that CPUs have been busy since the machine was started, the kernel's work outside any process
/// included.
pub struct Busy {
    /// That of the upstream.
    pub upstream: f64,
    /// Both, or the one that there is.
    pub both: f64,
}

impl Busy {
    /// Until now.
    pub fn now(cpus: Cpus) -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let busy = |cpu| busy_of_cpu(&stat, cpu).context("read the CPUs in /proc/stat");
        let (upstream, pod) = (busy(cpus.upstream)?, busy(cpus.pod)?);
        Ok(Self { upstream, both: if cpus.pod == cpus.upstream { pod } else { pod + upstream } })
    }
}

/// How busy others keep the CPUs that are measured.
pub struct Strangers {
    cpus: Cpus,
    start: Instant,
    before: f64,
}

impl Strangers {
    /// Starts watching.
    pub fn watch(cpus: Cpus) -> Result<Self> {
        Ok(Self { cpus, start: Instant::now(), before: Self::spent(cpus)? })
    }

    /// How many CPUs, on average, worked for somebody else since the start.
    pub fn share(&self) -> Result<f64> {
        let spent = Self::spent(self.cpus)? - self.before;
        Ok(spent.max(0.0) / self.start.elapsed().as_secs_f64())
    }

    /// What is busy but was not spent by this process or its children that have ended.
    fn spent(cpus: Cpus) -> Result<f64> {
        let own = times_of("self")?;
        Ok(Busy::now(cpus)?.both - own.into_iter().sum::<f64>())
    }
}

/// The kernel counts in hundredths of a second for user space, on every architecture.
const TICKS: f64 = 100.0;

/// What the threads of a process that still run have taken, in finer units than /proc/PID/stat counts in.
pub fn running(process: u32) -> io::Result<Duration> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(format!("/proc/{process}/task"))? {
        let said = fs::read_to_string(thread?.path().join("schedstat"))?;
        nanoseconds += said.split(' ').next().and_then(|it| it.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanoseconds))
}

/// user + nice + system + irq + softirq of one CPU: all but idle, waiting and stolen time.
fn busy_of_cpu(stat: &str, cpu: usize) -> Option<f64> {
    let mut fields =
        stat.lines().find_map(|line| line.strip_prefix(&format!("cpu{cpu} ")))?.split_whitespace();
    let mut next = || fields.next()?.parse::<f64>().ok();
    let (user, nice, system) = (next()?, next()?, next()?);
    let (_idle, _waiting) = (next()?, next()?);
    Some((user + nice + system + next()? + next()?) / TICKS)
}

/// utime, stime, and those of its children that have ended.
pub fn times_of(process: impl Display) -> Result<[f64; 4]> {
    let path = format!("/proc/{process}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    times_in(&stat).with_context(|| format!("find the times in {path}"))
}

fn times_in(stat: &str) -> Option<[f64; 4]> {
    // The name may hold spaces and parentheses; state and the numbers come after its last one.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || Some(fields.next()?.parse::<f64>().ok()? / TICKS);
    Some([next()?, next()?, next()?, next()?])
}

fn affinity() -> Result<libc::cpu_set_t> {
    // SAFETY: a `cpu_set_t` is a bit array: all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: the pointer and the size describe `set`, which the kernel fills.
    let done = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    ensure!(done == 0, "read the CPUs that may be used: {}", io::Error::last_os_error());
    Ok(set)
}

fn contains(set: &libc::cpu_set_t, cpu: usize) -> bool {
    // SAFETY: the macro panics if the index is beyond the set, and only reads the set.
    unsafe { libc::CPU_ISSET(cpu, set) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_waiting_and_stolen_time_is_not_busy() {
        let stat = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 20 300 5000 600 7 80 9 0 0\n";
        assert_eq!(busy_of_cpu(stat, 0), Some(5.07));
        assert_eq!(busy_of_cpu(stat, 1), None);
    }

    #[test]
    fn a_process_may_have_a_strange_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 250 50 0 20 20 0 1 0 5 6 7";
        assert_eq!(times_in(stat), Some([2.5, 0.5, 0.0, 0.2]));
    }
}

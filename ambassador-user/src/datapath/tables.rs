//! The maps of the `direct` tier: where routes listen and lead, and what the kernel counted.

mod table;

use std::collections::HashMap as Known;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use ambassador_ebpf::Address;
use ambassador_ebpf::direct::{
    CARRIED, CARRIED_TO, ENDS, LISTENERS, MISSES, MOST_ROUTES, NO_TABLE, OPEN, ROUTES, SETTINGS,
    TABLES, TARGETS, Table, TargetKey,
};
pub use ambassador_ebpf::direct::{
    Carried, End, Flow, IN_ORDER, MISS_REASONS, NEVER_ESTABLISHED, NO_LIMIT, RESET, RESET_BY_APP,
    RESET_BY_TARGET, SLOTS, Settings, TARGET_LOST, Target, route_id,
};
use anyhow::{Context, Result, bail};
use aya::maps::{Array, HashMap, MapData, MapError, RingBuf};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::programs::Maps;
pub use table::{Plan, Policy};

/// Most addresses that all routes together may listen on.
pub const MOST_ADDRESSES: usize = 2 * MOST_ROUTES as usize;
/// How long hooks that have begun are waited for where the kernel does not tell.
const LONGEST_HOOK: Duration = Duration::from_millis(100);

/// The tables, and what only this process may write.
pub struct Tables {
    settings: Array<MapData, Settings>,
    listeners: HashMap<MapData, Address, u32>,
    routes: Array<MapData, u32>,
    carried: Array<MapData, Carried>,
    carried_to: HashMap<MapData, TargetKey, Carried>,
    tables: Array<MapData, Table>,
    targets: HashMap<MapData, TargetKey, Target>,
    misses: Array<MapData, u64>,
    open: HashMap<MapData, u64, Flow>,
    /// As they stand in the map.
    now: Settings,
    /// By route, which of its two tables is in force.
    second: Known<u32, bool>,
}

/// The ends of connections, as the kernel tells them.
pub struct Ends(RingBuf<MapData>);

impl Tables {
    /// Takes the maps over. What they hold is in force until [`Tables::listen`].
    pub fn new(maps: &mut Maps) -> Result<(Self, Ends)> {
        let settings: Array<_, _> = maps.take(SETTINGS)?;
        let tables = Self {
            now: settings.get(&0, 0).context("read the settings")?,
            settings,
            listeners: maps.take(LISTENERS)?,
            routes: maps.take(ROUTES)?,
            carried: maps.take(CARRIED)?,
            carried_to: maps.take(CARRIED_TO)?,
            tables: maps.take(TABLES)?,
            targets: maps.take(TARGETS)?,
            misses: maps.take(MISSES)?,
            open: maps.take(OPEN)?,
            second: Known::new(),
        };
        Ok((tables, Ends(maps.take(ENDS)?)))
    }

    /// What loaded them, and for whom.
    pub fn settings(&self) -> &Settings {
        &self.now
    }

    /// Says what loaded them, and for whom; nothing is in force then.
    pub fn found(&mut self, settings: Settings) -> Result<()> {
        self.now = settings;
        self.close()
    }

    /// Replaces all routes: each index listens on these addresses, and leads nowhere yet. Nothing is in
    /// force until [`Tables::renew`].
    pub fn listen(&mut self, listeners: &[(SocketAddr, u32)]) -> Result<()> {
        self.close()?;
        let old = self.listeners.keys().collect::<Result<Vec<_>, _>>().context("list listeners")?;
        for address in old {
            self.listeners.remove(&address).context("remove a listener")?;
        }
        for route in 0..self.room() {
            self.routes.set(route, NO_TABLE, 0).context("take a route out of force")?;
            self.carry(route, Carried::default())?;
        }
        let old = self.carried_to.keys().collect::<Result<Vec<_>, _>>();
        for key in old.context("list addresses")? {
            self.carried_to.remove(&key).context("forget an address")?;
        }
        for (address, route) in listeners {
            self.lead(*address, *route)?;
        }
        Ok(())
    }

    /// For how many routes they were loaded.
    pub fn room(&self) -> u32 {
        (self.tables.len() / 2).min(MOST_ROUTES)
    }

    /// From now on connections to this address, which leads nowhere yet, are those of a route.
    pub fn lead(&mut self, address: SocketAddr, route: u32) -> Result<()> {
        self.listeners.insert(to_kernel(address), route, 0).context("add a listener")
    }

    /// Connections to this address are nobody's any more. Until [`wait_for_hooks`] has returned, no address
    /// may be added: the kernel may use the same memory for it, which a hook may still be reading.
    pub fn leave(&mut self, address: SocketAddr) -> Result<()> {
        self.listeners.remove(&to_kernel(address)).context("remove a listener")
    }

    /// Forgets all that the maps hold, connections that are open aside.
    pub fn empty(&mut self) -> Result<()> {
        self.listen(&[])?;
        let known = self.targets.keys().collect::<Result<Vec<_>, _>>().context("list targets")?;
        for key in known {
            self.targets.remove(&key).context("forget a target")?;
        }
        for reason in 0..MISS_REASONS {
            self.misses.set(reason, 0, 0).context("forget what was missed")?;
        }
        Ok(())
    }

    /// Puts a route in force as planned, in one step.
    pub fn put(&mut self, route: u32, plan: &Plan) -> Result<()> {
        let second = self.second.entry(route).or_default();
        let index = 2 * route + u32::from(!*second);
        self.tables.set(index, plan.table(), 0).context("write a table")?;
        self.routes.set(route, index, 0).context("put a table in force")?;
        *second = !*second;
        Ok(())
    }

    /// Leaves a route's connections to user space.
    pub fn withdraw(&mut self, route: u32) -> Result<()> {
        self.routes.set(route, NO_TABLE, 0).context("take a route out of force")
    }

    /// These of a route's connections are carried in user space.
    pub fn carry(&mut self, route: u32, connections: Carried) -> Result<()> {
        self.carried.set(route, connections, 0).context("tell how many connections are carried")
    }

    /// The same, of those to one address.
    pub fn carry_to(&mut self, route: u64, address: SocketAddr, ours: Carried) -> Result<()> {
        let key = TargetKey { route, address: to_kernel(address), reserved: 0 };
        let told = match ours {
            Carried { active: 0, .. } => match self.carried_to.remove(&key) {
                Err(MapError::KeyNotFound) => Ok(()),
                removed => removed,
            },
            ours => self.carried_to.insert(key, ours, 0),
        };
        told.context("tell how many connections to an address are carried")
    }

    /// Everything holds for this long from now, or until it is closed.
    pub fn renew(&mut self, time: Option<Duration>) -> Result<()> {
        let fresh_until = match time {
            None => u64::MAX,
            Some(time) => now()? + u64::try_from(time.as_nanos()).context("add up a time")?,
        };
        self.set(fresh_until)
    }

    /// As [`Tables::renew`], unless they have been closed.
    pub fn renew_if_open(&mut self, time: Option<Duration>) -> Result<()> {
        if self.now.fresh_until == 0 { Ok(()) } else { self.renew(time) }
    }

    /// Nothing is redirected any more.
    pub fn close(&mut self) -> Result<()> {
        self.set(0)
    }

    fn set(&mut self, fresh_until: u64) -> Result<()> {
        self.now.fresh_until = fresh_until;
        self.settings.set(0, self.now, 0).context("write the settings")
    }

    /// What became of a route's connections to one address.
    pub fn target(&self, route: u64, address: SocketAddr) -> Result<Target> {
        self.state(&TargetKey { route, address: to_kernel(address), reserved: 0 })
    }

    /// Connections to routed addresses that were left to user space, by the reason: the app chose where
    /// they come from, no address would do, a map was full.
    pub fn missed(&self) -> [u64; MISS_REASONS as usize] {
        let count = |reason: usize| self.misses.get(&(reason as u32), 0).unwrap_or(0);
        std::array::from_fn(count)
    }

    /// Whatever connections were ever led to, by their routes.
    pub fn targets(&self) -> Vec<(u64, SocketAddr)> {
        let known = self.targets.keys().filter_map(Result::ok);
        // An address of zeros stands for the route itself.
        let known = known.filter(|key| *key != TargetKey::of_route(key.route));
        known.map(|key| (key.route, from_kernel(key.address))).collect()
    }

    /// Gives up what is known of an address that no table names any more, unless connections to it are
    /// open; says whether it is gone.
    pub fn forget(&mut self, route: u64, address: SocketAddr) -> Result<bool> {
        self.forget_state(TargetKey { route, address: to_kernel(address), reserved: 0 })
    }

    fn forget_state(&mut self, key: TargetKey) -> Result<bool> {
        if self.state(&key)?.active > 0 {
            return Ok(false);
        }
        match self.targets.remove(&key) {
            Err(MapError::KeyNotFound) => Ok(true),
            gone => gone.map(|()| true).context("forget a target"),
        }
    }

    /// Gives up what is known of a route that is no more, unless it has connections; says whether it is gone.
    pub fn forget_route(&mut self, route: u64) -> Result<bool> {
        self.forget_state(TargetKey::of_route(route))
    }

    /// How many of a route's connections ended while there was no room to tell of it.
    pub fn untold(&self, route: u64) -> u64 {
        self.route(route).map_or(0, |counted| counted.untold)
    }

    /// What became of a route's connections.
    pub fn route(&self, route: u64) -> Result<Target> {
        self.state(&TargetKey::of_route(route))
    }

    fn state(&self, key: &TargetKey) -> Result<Target> {
        match self.targets.get(key, 0) {
            Err(MapError::KeyNotFound) => Ok(Target::default()),
            state => state.context("read a target"),
        }
    }

    /// The connections that are open, by the cookies of their sockets. One that ends meanwhile may be
    /// missing, and others with it.
    pub fn open(&self) -> Vec<(u64, Flow)> {
        self.open.iter().filter_map(Result::ok).collect()
    }
}

impl Ends {
    /// Registers the ring with the current runtime: it is readable when something was told.
    pub fn register(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: a ring owns its descriptor and shows the same one for as long as it lives.
        unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }
            .map_err(io::Error::from)
    }
}

/// Those that have been told; more may come.
impl Iterator for Ends {
    type Item = End;

    fn next(&mut self) -> Option<End> {
        let told = self.0.next()?;
        // SAFETY: of the kernel half, which was checked to speak of the same `End`; any bytes are one,
        // and their place in the ring need not be aligned.
        (told.len() >= size_of::<End>())
            .then(|| unsafe { told.as_ptr().cast::<End>().read_unaligned() })
    }
}

impl AsRawFd for Ends {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// As the kernel half has it.
pub(super) fn to_kernel(address: SocketAddr) -> Address {
    let port = u32::from(address.port().to_be());
    match address.ip() {
        IpAddr::V4(ip) => Address::v4(u32::from_ne_bytes(ip.octets()), port),
        IpAddr::V6(ip) => {
            let mut words = [0; 4];
            for (word, bytes) in words.iter_mut().zip(ip.octets().chunks_exact(4)) {
                *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
            Address { ip: words, port }
        }
    }
}

/// As people have it.
pub fn from_kernel(address: Address) -> SocketAddr {
    let port = u16::from_be(address.port as u16);
    let mut octets = [0; 16];
    for (bytes, word) in octets.chunks_exact_mut(4).zip(address.ip) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    SocketAddr::new(IpAddr::from(octets).to_canonical(), port)
}

/// Returns when every hook has ended that had begun before: none of them reads what was taken away since.
/// Takes some milliseconds, of which none is spent computing.
pub fn wait_for_hooks() {
    /// `MEMBARRIER_CMD_GLOBAL` of include/uapi/linux/membarrier.h, which is a synchronize_rcu().
    const GLOBAL: libc::c_long = 1;
    // SAFETY: this membarrier(2) takes numbers only.
    if unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) } != 0 {
        std::thread::sleep(LONGEST_HOOK);
    }
}

/// Nanoseconds of the boot-time clock, which the kernel half goes by.
pub fn now() -> Result<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec.
    if unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) } != 0 {
        bail!("read the boot-time clock: {}", io::Error::last_os_error());
    }
    Ok(time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back_as_they_went() {
        for text in ["127.0.0.1:5432", "10.1.2.3:1", "[::1]:65535", "[fd00::1:2]:80"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(from_kernel(to_kernel(address)), address);
        }
        let mapped = "[::ffff:10.1.2.3]:1".parse().unwrap();
        assert_eq!(from_kernel(to_kernel(mapped)), "10.1.2.3:1".parse().unwrap());
    }
}

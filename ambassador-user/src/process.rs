//! What the kernel says of this process: memory, time, descriptors.

use std::io;

/// A look at /proc/self.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    pub resident_bytes: u64,
    pub cpu_seconds: f64,
    pub open_fds: u64,
    pub max_fds: u64,
}

impl Figures {
    pub fn now() -> io::Result<Self> {
        let statm = std::fs::read_to_string("/proc/self/statm")?;
        let resident_pages: u64 = field(&statm, 1)?;
        let stat = std::fs::read_to_string("/proc/self/stat")?;
        // The command name may hold anything, blanks and brackets too; the numbers follow its end.
        let numbers = stat.rsplit_once(')').map_or("", |(_, numbers)| numbers);
        let ticks: u64 = field::<u64>(numbers, 11)? + field::<u64>(numbers, 12)?;
        Ok(Self {
            resident_bytes: resident_pages * system(libc::_SC_PAGESIZE),
            cpu_seconds: ticks as f64 / system(libc::_SC_CLK_TCK) as f64,
            open_fds: std::fs::read_dir("/proc/self/fd")?.count() as u64,
            max_fds: open_file_limit()?.rlim_cur,
        })
    }
}

/// Lets the process open as many files as it is allowed to: a connection takes two.
pub fn raise_open_file_limit() -> io::Result<u64> {
    let mut limit = open_file_limit()?;
    limit.rlim_cur = limit.rlim_max;
    set_open_file_limit(&limit)?;
    Ok(limit.rlim_cur)
}

/// Whether nothing else happens in this process meanwhile.
pub fn is_single_threaded() -> bool {
    std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1)
}

/// Does something during which no thread of this process can open a file. What is open stays so.
pub fn without_opening_files<T>(act: impl FnOnce() -> T) -> io::Result<T> {
    let limit = open_file_limit()?;
    set_open_file_limit(&libc::rlimit { rlim_cur: 0, ..limit })?;
    let done = act();
    set_open_file_limit(&limit)?;
    Ok(done)
}

fn set_open_file_limit(limit: &libc::rlimit) -> io::Result<()> {
    // SAFETY: setrlimit(2) reads the structure it is given.
    match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, limit) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn open_file_limit() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit(2) writes the structure it is given.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit)
}

fn system(name: libc::c_int) -> u64 {
    // SAFETY: sysconf(3) only takes a number and gives one.
    let value = unsafe { libc::sysconf(name) };
    u64::try_from(value).unwrap_or(1)
}

fn field<T: std::str::FromStr>(text: &str, index: usize) -> io::Result<T> {
    text.split_whitespace().nth(index).and_then(|word| word.parse().ok()).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "unexpected format of /proc/self")
    })
}

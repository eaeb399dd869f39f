//! Names the process that has a port, as far as /proc lets us see it.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;

/// State of a listening socket in /proc/net/tcp (include/net/tcp_states.h).
const LISTEN: &str = "0A";

/// "process 4711 (redis-server)", if it can be found: same user or root, same process namespace.
pub fn of(address: SocketAddr) -> Option<String> {
    let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| listeners(&table, address.port()))
        .collect();
    let processes = fs::read_dir("/proc").ok()?;
    for process in processes.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        else {
            continue;
        };
        if has_one_of(&process.path(), &inodes) {
            let mut owner = format!("process {pid}");
            if let Ok(command) = fs::read_to_string(process.path().join("comm")) {
                let _ = write!(owner, " ({})", command.trim());
            }
            return Some(owner);
        }
    }
    None
}

/// The sockets that listen on `port`, as the links in /proc/PID/fd show them.
fn listeners(table: &str, port: u16) -> Vec<String> {
    let port = format!(":{port:04X}");
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let local = fields.nth(1)?;
            let state = fields.nth(1)?;
            let inode = fields.nth(5)?;
            (local.ends_with(&port) && state == LISTEN).then(|| format!("socket:[{inode}]"))
        })
        .collect()
}

fn has_one_of(process: &Path, sockets: &[String]) -> bool {
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return false };
    descriptors.flatten().any(|descriptor| {
        fs::read_link(descriptor.path())
            .is_ok_and(|target| sockets.iter().any(|socket| target.as_os_str() == socket.as_str()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_this_process_as_the_owner_of_its_port() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let owner = of(listener.local_addr().unwrap()).unwrap();
        assert!(owner.starts_with(&format!("process {} (", std::process::id())), "{owner}");
    }
}

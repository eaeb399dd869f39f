//! A process and its descendants: a server or a proxy may fork for each connection.

use std::fs;

/// The process first, then those it has started that still run, and theirs.
pub fn of(process: u32) -> Vec<u32> {
    let mut family = vec![process];
    let mut asked = 0;
    while let Some(&member) = family.get(asked) {
        asked += 1;
        family.extend(children(member));
    }
    family
}

/// Those a process has started. One that has ended has none.
fn children(process: u32) -> Vec<u32> {
    // Each thread has its own.
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let lists =
        threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists.flat_map(|list| numbers(&list)).collect()
}

fn numbers(list: &str) -> Vec<u32> {
    list.split_whitespace().filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::wait::{SOON, until};

    #[test]
    fn grandchildren_belong_to_the_family() {
        // `cat` waits for an end of its input that comes when we close it.
        let mut shell = Command::new("sh")
            .args(["-c", "(cat; true); true"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("start a shell");
        let family = until("a family of three", SOON, || {
            let family = of(shell.id());
            Ok((family.len() == 3).then_some(family))
        });
        drop(shell.stdin.take());
        shell.wait().expect("wait for the shell");
        assert_eq!(family.expect("three generations")[0], shell.id());
        assert_eq!(of(shell.id()), [shell.id()]);
    }
}

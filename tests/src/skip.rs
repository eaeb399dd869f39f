//! Skipping a test that cannot run here: said at once, and counted by `cargo xtask test`.

use std::fs::OpenOptions;
use std::io::Write;

/// The variable naming the file that collects what was skipped, one `test<TAB>reason` a line.
pub const LIST: &str = "AMBASSADOR_SKIPS";

/// What ends the name of a test in that file that ran, but without a part of what it does elsewhere.
pub const PART: &str = " (a part)";

/// Ends the test that calls it, saying why: `skip!("needs root")`, formatted like `format!`.
///
/// For a test that returns nothing or a `Result<(), _>`.
#[macro_export]
macro_rules! skip {
    ($($why:tt)+) => {{
        fn here() {}
        return $crate::skip::report(::std::any::type_name_of_val(&here), &format!($($why)+));
    }};
}

/// Ends a test that needs a program that is not installed: `installed!("redis-server")`.
#[macro_export]
macro_rules! installed {
    ($($program:literal),+ $(,)?) => {
        if let Some(program) = $crate::server::missing(&[$($program),+]) {
            $crate::skip!("{program} is not installed");
        }
    };
}

/// What a test returns when it has nothing to complain about.
pub trait Outcome {
    /// The value that ends the test quietly.
    fn skipped() -> Self;
}

impl Outcome for () {
    fn skipped() -> Self {}
}

impl<E> Outcome for Result<(), E> {
    fn skipped() -> Self {
        Ok(())
    }
}

/// Says that a test is skipped; [`skip!`](crate::skip) is the way to call it.
///
/// # Panics
/// If the list exists but cannot be written: a skip that is not counted would pass for a success.
pub fn report<R: Outcome>(item: &str, why: &str) -> R {
    tell(item.trim_end_matches("::here").trim_end_matches("::{{closure}}"), why);
    R::skipped()
}

/// Says that the test that runs on this thread goes without a part of what it does elsewhere.
///
/// # Panics
/// As [`report`].
pub fn in_part(why: &str) {
    let thread = std::thread::current();
    tell(&format!("{}{PART}", thread.name().unwrap_or_default()), why);
}

fn tell(test: &str, why: &str) {
    // Past the test runner's capture, which would hide the line of a test that passes, and in
    // one piece, because tests run side by side. Losing the line is no reason to fail.
    let _ = std::io::stderr().write_all(format!("skipped: {test}: {why}\n").as_bytes());
    if let Some(list) = std::env::var_os(LIST) {
        let line = format!("{test}\t{}\n", why.replace('\n', " "));
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&list)
            .and_then(|mut list| list.write_all(line.as_bytes()))
            .unwrap_or_else(|error| panic!("add to the list of skipped tests {list:?}: {error}"));
    }
}

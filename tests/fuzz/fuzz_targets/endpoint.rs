//! Any text in place of an endpoint or a route is read, or refused in one line; what is read means
//! the same when it is written and read again.
#![no_main]

use ambassador::cli::ConfigArgs;
use ambassador::config::{Environment, Target};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match text.parse::<Target>() {
        Ok(target) => assert_eq!(target.to_string().parse(), Ok(target)),
        Err(problem) => assert!(!problem.to_string().chars().any(char::is_control), "{problem:?}"),
    }
    let flags = ConfigArgs { routes: vec![text.to_owned()], ..ConfigArgs::default() };
    if let Err(error) = flags.load(&Environment::default()) {
        assert!(!error.to_string().chars().any(char::is_control), "{error:?}");
    }
});

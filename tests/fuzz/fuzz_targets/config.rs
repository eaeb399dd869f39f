//! Any text in place of a configuration file is read, or refused in one line.
#![no_main]

use std::path::Path;

use ambassador::config::Resolved;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for path in ["c.yaml", "c.toml"] {
        match Resolved::of_text(Path::new(path), text.to_owned()) {
            Ok(resolved) => assert!(!resolved.config.routes.is_empty()),
            Err(error) => assert!(!error.to_string().chars().any(char::is_control), "{error:?}"),
        }
    }
});

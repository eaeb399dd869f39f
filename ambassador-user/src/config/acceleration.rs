//! The settings of the kernel tiers, each with its grammar and its bounds.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use schemars::{Schema, json_schema};

use super::problem::{Problem, quote};
use super::text::Written;
use super::value::{Count, Within};
use super::words::words;
use super::{Cgroup, Clients};

/// `acceleration.inflight_bytes`: 64 KiB to 16 MiB.
pub(crate) type InFlightBytes = Count<65_536, 16_777_216>;

/// `acceleration.inflight_messages`.
pub(crate) type InFlightMessages = Count<16, 65_536>;

/// `acceleration.instance`: one component of a path on a bpffs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InstanceText(pub(crate) Arc<str>);

/// `acceleration.stale_after`: a duration; `None` is never, written `0s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StaleAfterText(pub(crate) Option<Duration>);

impl FromStr for Cgroup {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let path = Path::new(text);
        let refused = if text == "auto" {
            return Ok(Self::Auto);
        } else if !path.is_absolute() {
            "is not an absolute path"
        } else if text.chars().any(char::is_control) {
            "contains a control character"
        } else if path.components().any(|part| part == Component::ParentDir) {
            "goes up with .."
        } else {
            return Ok(Self::At(PathBuf::from(text)));
        };
        let fix = "write the pod's cgroup from the root, such as /sys/fs/cgroup/pod, or auto";
        Err(Problem::new(format!("{} {refused}", quote(text)), fix))
    }
}

impl fmt::Display for Cgroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::At(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Written for Cgroup {
    const EXPECTED: &'static str = "the absolute path of a cgroup, or auto";

    fn schema() -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^(auto|/.*)$",
            "examples": ["auto", "/sys/fs/cgroup/pod"],
        })
    }
}

impl FromStr for InstanceText {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        // A bpffs refuses names with a dot.
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
        if !text.bytes().all(allowed) || !(1..=64).contains(&text.len()) {
            return Err(Problem::new(
                format!("{} does not name an instance", quote(text)),
                "write letters, digits, _ and -, at most 64 in all",
            ));
        }
        Ok(Self(text.into()))
    }
}

impl Written for InstanceText {
    const EXPECTED: &'static str = "the name of an instance, such as orders-7f9c";

    fn schema() -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^[A-Za-z0-9_-]{1,64}$",
            "examples": ["orders-7f9c"],
        })
    }
}

impl FromStr for StaleAfterText {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let Within(time) = text.parse::<Within<0, 86_400_000>>()?;
        if time.is_zero() {
            return Ok(Self(None));
        }
        // Below that, one late sign of life from a busy ambassador would close its tables.
        if time < Duration::from_secs(10) {
            return Err(Problem::new(
                format!("{} is too short", quote(text)),
                "write 10s to 1day, or 0s for never",
            ));
        }
        Ok(Self(Some(time)))
    }
}

impl Written for StaleAfterText {
    const EXPECTED: &'static str = Within::<0, 86_400_000>::EXPECTED;

    fn schema() -> Schema {
        let mut schema = Within::<0, 86_400_000>::schema();
        schema.insert("description".into(), "A duration, 10s to 1day, or 0s for never".into());
        schema
    }
}

words! {
    Clients, a "kind of clients", expected "a kind of clients: any or nonblocking":
    "any" = Any, "nonblocking" = NonBlocking
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_auto_or_a_path_from_the_root() {
        assert_eq!("auto".parse(), Ok(Cgroup::Auto));
        assert_eq!("/sys/fs/cgroup/a b".parse(), Ok(Cgroup::At("/sys/fs/cgroup/a b".into())));
        for text in ["", "Auto", "kubepods/pod1", "../pod1", "/sys/fs/cgroup/../..", "/a\nb"] {
            assert!(text.parse::<Cgroup>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_instance_is_one_component_of_a_path() {
        let longest = "x".repeat(64);
        for text in ["a", "0b9e8f6c-1d2e", "Orders-v2_1", "-", &longest] {
            assert_eq!(&*text.parse::<InstanceText>().unwrap().0, text);
        }
        for text in
            ["", ".", "..", ".a", "a.b", "a~", "a/b", "a b", "ä", "a\0", &format!("{longest}x")]
        {
            assert!(text.parse::<InstanceText>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_table_goes_stale_after_ten_seconds_at_the_earliest_or_never() {
        let seconds = |text: &str| {
            let StaleAfterText(time) = text.parse().ok()?;
            Some(time.map_or(0, |time| time.as_secs()))
        };
        assert_eq!(["0s", "10s", "1day"].map(seconds), [Some(0), Some(10), Some(86_400)]);
        assert_eq!(["1ms", "9999ms", "1day 1ms", "10", "never"].map(seconds), [None; 5]);
    }
}

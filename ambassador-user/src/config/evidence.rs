//! What may say which profile is in force: a variable, a file, or how the namespace's name ends.
//!
//! ```text
//! EVIDENCE  env:NAME | file:PATH | namespace-suffix[:PATH]
//! ```
//!
//! A variable or a file says the profile's name and nothing else. A namespace says it by what its name ends
//! in: `orders-prod` is `prod`, and so is `prod`.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use schemars::{Schema, json_schema};

use super::environment::Environment;
use super::name::Name;
use super::problem::{ConfigError, Place, Problem, quote};
use super::text::Written;

/// Where Kubernetes tells a Pod its namespace.
const NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";
/// The longest file that is a profile's name.
const MAX_BYTES: u64 = 1024;
/// Before a profile's name they say that it is another: `orders-non-prod` is not `prod`.
const NEGATIONS: [&str; 4] = ["no", "non", "not", "pre"];

/// One piece of evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Evidence {
    Variable(String),
    File(PathBuf),
    NamespaceSuffix(PathBuf),
}

impl Evidence {
    /// What it says, if it says anything; it was asked for at `place`.
    pub(crate) fn read(
        &self,
        environment: &Environment,
        place: &Place,
    ) -> Result<Option<String>, ConfigError> {
        match self {
            Self::Variable(name) => {
                let value = environment.get(name)?.map(str::trim);
                Ok(value.filter(|value| !value.is_empty()).map(str::to_owned))
            }
            Self::File(path) | Self::NamespaceSuffix(path) => content(path).map_err(|error| {
                let fix = "let this user read it, or leave it out";
                Problem::new(format!("{self} cannot be read: {error}"), fix).at(place)
            }),
        }
    }

    /// The one of the `known` profiles that it means by this.
    pub(crate) fn profile<'k>(&self, said: &str, known: &BTreeSet<&'k Name>) -> Option<&'k Name> {
        let means = |name: &&Name| match self {
            Self::Variable(_) | Self::File(_) => name.as_str() == said,
            Self::NamespaceSuffix(_) => match said.strip_suffix(name.as_str()) {
                Some("") => true,
                Some(before) => before.strip_suffix('-').is_some_and(|before| {
                    !NEGATIONS.contains(&before.rsplit('-').next().unwrap_or_default())
                }),
                None => false,
            },
        };
        // Of pre-prod and prod, orders-pre-prod ends in both, and means the longer.
        known.iter().copied().filter(means).max_by_key(|name| name.as_str().len())
    }
}

/// A file's text without the space around it; nothing if there is no file, or nothing in it.
fn content(path: &Path) -> io::Result<Option<String>> {
    // A pipe that nobody writes to would have us wait for ever.
    let open = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = match open {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        open => open?,
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no ordinary file"));
    }
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(io::Error::other("it is longer than 1 KiB"));
    }
    let text = text.trim();
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

impl FromStr for Evidence {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let (kind, value) = text.split_once(':').map_or((text, None), |(k, v)| (k, Some(v)));
        match (kind, value) {
            ("env", Some(name)) => variable(name).map(Self::Variable),
            ("file", Some(path)) => absolute(path).map(Self::File),
            ("namespace-suffix", None) => Ok(Self::NamespaceSuffix(NAMESPACE.into())),
            ("namespace-suffix", Some(path)) => absolute(path).map(Self::NamespaceSuffix),
            _ => Err(Problem::new(
                format!("{} is not evidence of a profile", quote(text)),
                "write env:NAME, file:PATH or namespace-suffix",
            )),
        }
    }
}

fn variable(name: &str) -> Result<String, Problem> {
    let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
    if name.is_empty() || !is_name {
        let what = format!("{} is not the name of a variable", quote(name));
        return Err(Problem::new(what, "write env:NAME, such as env:APP_ENV"));
    }
    Ok(name.to_owned())
}

fn absolute(path: &str) -> Result<PathBuf, Problem> {
    if !path.starts_with('/') || path.chars().any(char::is_control) {
        let what = format!("{} is not an absolute path", quote(path));
        return Err(Problem::new(what, "write it from the root, such as /etc/podinfo/namespace"));
    }
    Ok(path.into())
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variable(name) => write!(f, "env:{name}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::NamespaceSuffix(path) if path == Path::new(NAMESPACE) => {
                f.write_str("namespace-suffix")
            }
            Self::NamespaceSuffix(path) => write!(f, "namespace-suffix:{}", path.display()),
        }
    }
}

impl Written for Evidence {
    const EXPECTED: &'static str = "evidence of a profile, such as env:APP_ENV";

    fn schema() -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^(env:[A-Za-z0-9_.-]+|file:/.*|namespace-suffix(:/.*)?)$",
            "examples": ["env:APP_ENV", "file:/etc/podinfo/namespace", "namespace-suffix"],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evidence(text: &str) -> Result<Evidence, String> {
        text.parse().map_err(|problem: Problem| problem.to_string())
    }

    #[test]
    fn evidence_is_written_as_it_is_read_and_a_slip_is_told() {
        for text in ["env:APP_ENV", "file:/a/b", "namespace-suffix", "namespace-suffix:/a"] {
            assert_eq!(evidence(text).unwrap().to_string(), text);
        }
        for (text, told) in [
            ("APP_ENV", "write env:NAME, file:PATH or namespace-suffix"),
            ("env:", "is not the name of a variable"),
            ("env:A=B", "is not the name of a variable"),
            ("file", "write env:NAME, file:PATH or namespace-suffix"),
            ("file:a", "is not an absolute path"),
            ("namespace-suffix:", "is not an absolute path"),
            ("namespace:/a", "write env:NAME, file:PATH or namespace-suffix"),
        ] {
            let error = evidence(text).unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
    }

    #[test]
    fn a_namespace_names_a_profile_by_its_last_words_and_never_by_a_part_of_one() {
        let names = ["dev", "prod", "pre-prod"].map(|name| name.parse().unwrap());
        let (two, three) = (names[..2].iter().collect(), names.iter().collect());
        let suffix = evidence("namespace-suffix").unwrap();
        for (namespace, profile) in [
            ("prod", Some("prod")),
            ("orders-prod", Some("prod")),
            ("a-b-dev", Some("dev")),
            ("orders-nonprod", None),
            ("orders-non-prod", None),
            ("orders-pre-prod", None),
            ("not-prod", None),
            ("prod-orders", None),
            ("orders-PROD", None),
            ("orders", None),
        ] {
            assert_eq!(suffix.profile(namespace, &two).map(Name::as_str), profile, "{namespace}");
        }
        assert_eq!(suffix.profile("orders-pre-prod", &three).map(Name::as_str), Some("pre-prod"));
        let whole = evidence("env:A").unwrap();
        assert_eq!(whole.profile("orders-prod", &two), None);
        assert_eq!(whole.profile("prod", &two).map(Name::as_str), Some("prod"));
    }

    #[test]
    fn what_is_not_there_says_nothing_and_what_cannot_be_read_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("said");
        let file = evidence(&format!("file:{}", path.display())).unwrap();
        let place = Place::named("from");
        let read = || file.read(&Environment::default(), &place).map_err(|error| error.to_string());
        assert_eq!(read(), Ok(None));
        std::fs::write(&path, " \n").unwrap();
        assert_eq!(read(), Ok(None));
        std::fs::write(&path, "prod\n").unwrap();
        assert_eq!(read(), Ok(Some("prod".to_owned())));
        std::fs::write(&path, "x".repeat(1025)).unwrap();
        assert!(read().unwrap_err().contains("longer than 1 KiB; let this user read it"));
        std::fs::write(&path, b"\xff").unwrap();
        assert!(read().unwrap_err().contains("UTF-8"));
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR).unwrap();
        assert!(read().unwrap_err().contains("no ordinary file"));

        let variable = evidence("env:A").unwrap();
        let of = |value: &str| {
            let environment = [("A", value)].into_iter().collect();
            variable.read(&environment, &place).unwrap()
        };
        assert_eq!((of(""), of("  "), of(" dev ")), (None, None, Some("dev".to_owned())));
    }
}

//! Reads a configuration file, and tells what is wrong with it in one line.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;

use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_path_to_error::Track;
use serde_saphyr::{MessageFormatter, UserMessageFormatter};

use super::file::FileText;
use super::layer::Layer;
use super::problem::{ConfigError, Place, Position, Problem, excerpt, nearest, quote};
use super::resolve::{Resolved, resolve};

/// The largest file that is read.
const MAX_BYTES: u64 = 1 << 20;

/// Keys that the design has and this release has not.
const LATER: [&str; 6] = ["environment", "health", "eject", "profiles", "cgroup", "clients"];

/// The text of a configuration file.
pub(crate) struct Document {
    file: Arc<Path>,
    text: String,
    format: Format,
}

impl Document {
    /// Reads `path`: TOML if its name ends in `.toml`, else YAML.
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigError> {
        let place = Place::in_file(&path.into(), "");
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|open| open.take(MAX_BYTES + 1).read_to_end(&mut bytes))
            .map_err(|error| {
                Problem::new(
                    format!("cannot be read: {error}"),
                    "name a file that this user may read",
                )
                .at(&place)
            })?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(Problem::new("is larger than 1 MiB", "write a smaller file").at(&place));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = position(error.as_bytes(), error.utf8_error().valid_up_to());
            Problem::new("is not UTF-8 text", "save the file as UTF-8").at(&place.at(Some(at)))
        })?;
        Ok(Self::new(path, text))
    }

    /// The text that is to be read as if it stood in `path`.
    pub(crate) fn new(path: &Path, text: String) -> Self {
        Self { file: path.into(), text, format: Format::of(path) }
    }

    /// What the file says.
    pub(crate) fn layer(&self) -> Result<Layer, ConfigError> {
        let parsed = self.format.parse(&self.text, PhantomData::<FileText>).map_err(|failure| {
            let place = Place::in_file(&self.file, failure.key).at(failure.position);
            self.locate(failure.problem.at(&place))
        })?;
        parsed.layer(&self.file).map_err(|error| self.locate(error))
    }

    /// The error with its line and column, if it is about a key of this file.
    pub(crate) fn locate(&self, error: ConfigError) -> ConfigError {
        error.located(|key| self.format.locate(&self.text, key))
    }
}

impl Resolved {
    /// What `text` means as the only source, read as if it stood in `path`.
    pub fn of_text(path: &Path, text: String) -> Result<Self, ConfigError> {
        let document = Document::new(path, text);
        resolve(vec![document.layer()?]).map_err(|error| document.locate(error))
    }
}

#[derive(Clone, Copy)]
enum Format {
    Yaml,
    Toml,
}

/// Why a text is not what was to be read from it.
struct Failure {
    problem: Problem,
    key: String,
    position: Option<Position>,
}

impl Format {
    fn of(file: &Path) -> Self {
        match file.extension() {
            Some(extension) if extension.eq_ignore_ascii_case("toml") => Self::Toml,
            _ => Self::Yaml,
        }
    }

    fn parse<'t, S: DeserializeSeed<'t>>(
        self,
        text: &'t str,
        seed: S,
    ) -> Result<S::Value, Failure> {
        let mut track = Track::new();
        let result = match self {
            Self::Yaml => parse_yaml(text, seed, &mut track),
            Self::Toml => parse_toml(text, seed, &mut track),
        };
        result.map_err(|(problem, position)| Failure {
            problem,
            position,
            // The path to the root is ".", and a key that could not be read is "?".
            key: track.path().to_string().trim_end_matches(['.', '?']).to_owned(),
        })
    }

    /// Where the value of `key` stands.
    fn locate(self, text: &str, key: &str) -> Option<Position> {
        let steps: Vec<&str> = key.split(['.', '[']).collect();
        self.parse(text, Seek(&steps)).err().and_then(|failure| failure.position)
    }
}

type Refusal = (Problem, Option<Position>);

fn parse_yaml<'t, S: DeserializeSeed<'t>>(
    text: &'t str,
    seed: S,
    track: &mut Track,
) -> Result<S::Value, Refusal> {
    let options = serde_saphyr::options! {
        with_snippet: false,
        strict_booleans: true,
        budget: serde_saphyr::budget! { max_depth: 16, max_documents: 1 },
    };
    serde_saphyr::with_deserializer_from_str_with_options(text, options, |yaml| {
        seed.deserialize(serde_path_to_error::Deserializer::new(yaml, track))
    })
    .map_err(|error| {
        let error = error.without_snippet();
        // A missing key is reported where its mapping ends, which helps nobody.
        let is_missing = matches!(error, serde_saphyr::Error::SerdeMissingField { .. });
        let position = error.location().filter(|at| at.line() > 0 && !is_missing);
        let position = position.map(|at| Position { line: at.line(), column: at.column() });
        (yaml_problem(error), position)
    })
}

fn parse_toml<'t, S: DeserializeSeed<'t>>(
    text: &'t str,
    seed: S,
    track: &mut Track,
) -> Result<S::Value, Refusal> {
    let at =
        |error: &toml::de::Error| error.span().map(|span| position(text.as_bytes(), span.start));
    let toml = toml::Deserializer::parse(text).map_err(|error| {
        let what = format!("is not TOML: {}", error.message());
        (Problem::new(what, "correct the line"), at(&error))
    })?;
    seed.deserialize(serde_path_to_error::Deserializer::new(toml, track))
        .map_err(|error| (toml_problem(error.message()), at(&error)))
}

fn yaml_problem(error: &serde_saphyr::Error) -> Problem {
    use serde_saphyr::Error;
    match error {
        Error::AliasError { error, .. } => yaml_problem(error),
        Error::Message { msg, .. } => Problem::carried(msg),
        Error::SerdeUnknownField { field, expected, .. } => unknown_key(field, expected),
        Error::SerdeMissingField { field, .. } => missing_key(field),
        Error::SerdeInvalidType { unexpected, expected, .. }
        | Error::SerdeInvalidValue { unexpected, expected, .. } => wrong_type(unexpected, expected),
        Error::DuplicateMappingKey { key, .. } => Problem::new(
            format!("the key {} is written twice", quote(key.as_deref().unwrap_or("here"))),
            "keep one",
        ),
        Error::Eof { .. } => Problem::new(
            "the file is empty",
            "write version: 1, routes and upstreams (`ambassador schema` lists all keys)",
        ),
        Error::Unexpected { expected: "string scalar", .. } => {
            Problem::new("a list or a mapping does not belong here", "write one value, in quotes")
        }
        Error::Unexpected { expected: "mapping start", .. } => {
            Problem::new("a mapping belongs here", "write KEY: VALUE")
        }
        Error::Unexpected { expected: "sequence start", .. } => {
            Problem::new("a list belongs here", "write - before each of its elements")
        }
        Error::InvalidBooleanStrict { .. } => {
            Problem::new("this is neither true nor false", "write one of them")
        }
        other => Problem::new(
            format!("is not usable YAML: {}", UserMessageFormatter.format_message(other)),
            "correct the line; values with [, { or \": \" need quotes",
        ),
    }
}

/// TOML carries serde's refusals as text only.
fn toml_problem(message: &str) -> Problem {
    let mut quoted = message.split('`').skip(1).step_by(2);
    if message.starts_with("unknown field") {
        let field = quoted.next().unwrap_or_default();
        unknown_key(field, &quoted.collect::<Vec<_>>())
    } else if message.starts_with("missing field") {
        missing_key(quoted.next().unwrap_or_default())
    } else if let Some((unexpected, expected)) = message
        .strip_prefix("invalid type: ")
        .or_else(|| message.strip_prefix("invalid value: "))
        .and_then(|rest| rest.rsplit_once(", expected "))
    {
        wrong_type(unexpected, expected)
    } else {
        Problem::carried(message)
    }
}

fn unknown_key(key: &str, known: &[&str]) -> Problem {
    if LATER.contains(&key) {
        return Problem::new(format!("the key {} is not in this release", quote(key)), "remove it");
    }
    let what = format!("unknown key {}", quote(key));
    match nearest(key, known.iter().copied()) {
        Some(near) => Problem::slip(what, near),
        None => Problem::new(what, format!("write one of {}", known.join(", "))),
    }
}

fn missing_key(key: &str) -> Problem {
    let fix = if key == "version" { "write version: 1".to_owned() } else { format!("add {key}") };
    Problem::new(format!("the key {key:?} is missing"), fix)
}

fn wrong_type(unexpected: &str, expected: &str) -> Problem {
    Problem::new(
        format!("{} does not belong here", excerpt(unexpected)),
        format!("write {expected}"),
    )
}

/// The line and column of a byte, both from 1.
fn position(text: &[u8], offset: usize) -> Position {
    let before = &text[..offset.min(text.len())];
    let line_start =
        before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    Position {
        line: before.iter().filter(|byte| **byte == b'\n').count() as u64 + 1,
        column: String::from_utf8_lossy(&before[line_start..]).chars().count() as u64 + 1,
    }
}

/// Walks to a key and stops there with an error, because errors are what carries a position.
struct Seek<'k>(&'k [&'k str]);

impl<'t> DeserializeSeed<'t> for Seek<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'t>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'t> Visitor<'t> for Seek<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("to arrive")
    }

    fn visit_map<A: MapAccess<'t>>(self, mut map: A) -> Result<(), A::Error> {
        let [step, rest @ ..] = self.0 else { return Err(A::Error::custom("here")) };
        while let Some(key) = map.next_key::<String>()? {
            if key == *step {
                return map.next_value_seed(Seek(rest));
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'t>>(self, mut list: A) -> Result<(), A::Error> {
        let [step, rest @ ..] = self.0 else { return Err(A::Error::custom("here")) };
        let index = step.trim_end_matches(']').parse().unwrap_or(usize::MAX);
        for _ in 0..index {
            if list.next_element::<IgnoredAny>()?.is_none() {
                return Ok(());
            }
        }
        list.next_element_seed(Seek(rest)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EXAMPLE: &str = include_str!("example.yaml");
    const TOML: &str = r#"version = 1
[[routes]]
listen = [5432, "unix:/run/db.sock"]
upstream = "db"
[upstreams.db]
endpoints = "db:5432"
connect = { timeout = "2s", attempts = 3 }
"#;

    fn yaml(text: impl Into<String>) -> Result<Resolved, String> {
        Resolved::of_text(Path::new("c.yaml"), text.into()).map_err(|error| error.to_string())
    }

    fn toml(text: impl Into<String>) -> Result<Resolved, String> {
        Resolved::of_text(Path::new("c.toml"), text.into()).map_err(|error| error.to_string())
    }

    /// `original` with one thing changed.
    fn with(original: &str, old: &str, new: &str) -> String {
        assert!(original.contains(old), "{old} is not in the original");
        original.replacen(old, new, 1)
    }

    #[test]
    fn yaml_and_toml_say_the_same() {
        let said_in_yaml = "version: 1
routes:
  - listen: [5432, 'unix:/run/db.sock']
    upstream: db
upstreams:
  db: { endpoints: db:5432, connect: { timeout: 2s, attempts: 3 } }";
        assert_eq!(yaml(said_in_yaml).unwrap().config, toml(TOML).unwrap().config);
    }

    #[test]
    fn a_list_of_one_needs_no_brackets_and_a_port_no_quotes() {
        let text =
            "{version: 1, routes: [{listen: 5432, upstream: a}], upstreams: {a: {endpoints: a:1}}}";
        assert_eq!(yaml(text).unwrap().config.routes[0].listen.len(), 2);
    }

    #[test]
    fn a_slip_in_yaml_is_one_line_with_file_line_column_place_problem_and_fix() {
        let wrong_unix = format!("\"unix:/{}\"", "x".repeat(107));
        for (old, new, expected) in [
            (
                "max_connections",
                "max_conections",
                "c.yaml:15:5: routes[0].max_conections: unknown key \"max_conections\", did you mean \"max_connections\"?",
            ),
            (
                "version: 1",
                "version: 1\nfoo: 1",
                "c.yaml:3:1: foo: unknown key \"foo\"; write one of version, admin, acceleration, drain, routes, upstreams",
            ),
            (
                "balance: failover",
                "health: {}",
                "c.yaml:22:5: upstreams.orders-db.health: the key \"health\" is not in this release; remove it",
            ),
            (
                "balance: failover",
                "balance: source_hash",
                "c.yaml:22:14: upstreams.orders-db.balance: balance source_hash is not in this release; write failover, round_robin, least_connections",
            ),
            (
                "protocol: tcp",
                "protocol: redis",
                "c.yaml:14:15: routes[0].protocol: protocol redis is not in this release; write tcp",
            ),
            ("version: 1\n", "", "c.yaml: the key \"version\" is missing; write version: 1"),
            (
                "version: 1",
                "version: 2",
                "c.yaml:2:10: version: version 2 is not known to this release; write version: 1",
            ),
            (
                "    upstream: orders-db\n",
                "",
                "c.yaml:11:5: routes[0]: the key \"upstream\" is missing; add upstream",
            ),
            (
                "upstream: orders-db",
                "upstream: order-db",
                "c.yaml:13:5: routes[0].upstream: there is no upstream \"order-db\", did you mean \"orders-db\"?",
            ),
            (
                "max_connections: 1000",
                "max_connections: 0",
                "c.yaml:15:22: routes[0].max_connections: 0 is out of bounds; write 1 to 1000000",
            ),
            (
                "idle_timeout: 0s",
                "idle_timeout: 5",
                "c.yaml:16:19: routes[0].idle_timeout: \"5\" is not a duration; write a number with its unit, such as 500ms, 2s or 5m, 0s to 1day",
            ),
            (
                "timeout: 2s",
                "timeout: 6m",
                "c.yaml:23:25: upstreams.orders-db.connect.timeout: \"6m\" is out of bounds; write 1ms to 5m",
            ),
            (
                "0660",
                "0990",
                "c.yaml:18:18: routes[0].socket_mode: \"0990\" is not a file mode; write three octal digits after a 0, in quotes, such as \"0660\"",
            ),
            (
                "[::1]:5432",
                "[::1]:0",
                "c.yaml:12:32: routes[0].listen[1]: port 0 would be a different port at every start; write the port that clients use, 1 to 65535",
            ),
            ("\"unix:/var/run/db/postgres.sock\"", &wrong_unix, "at most 107 bytes"),
            (
                "db-0.prod.svc:5432",
                "db-0.prod.svc",
                "c.yaml:21:17: upstreams.orders-db.endpoints[0]: \"db-0.prod.svc\" has no port; add :PORT, such as db:5432",
            ),
            (
                "db-0.prod.svc:5432",
                "db-0.prod.svc:5432:0",
                "\"0\" is not a weight; write 1 to 1000",
            ),
            (
                "db-1.prod.svc:5432",
                "localhost:5432",
                "c.yaml:11:5: routes[0]: the route leads to itself; write the address of the real service as its endpoint",
            ),
            (
                "max_ttl: 30s",
                "max_ttl: 10ms",
                "upstreams.orders-db.dns: min_ttl 1s is above max_ttl 10ms; raise max_ttl or lower min_ttl",
            ),
            (
                "grace: 0s",
                "grace: 1m",
                "drain.grace: grace 1m ends after deadline 25s; raise the deadline or shorten the grace",
            ),
            (
                "tier: auto\n  require: none",
                "tier: copy\n  require: splice",
                "acceleration.require: tier splice is required, and only copy and below is allowed; require copy or lower, or allow splice",
            ),
            (
                "require: none",
                "require: sockmap",
                "routes[0].tier: tier sockmap is required, and this route allows only splice; allow sockmap here, or lower acceleration.require",
            ),
            ("stale: true", "stale: yes", "this is neither true nor false; write one of them"),
            (
                "http: 0.0.0.0:9090",
                "http: 9090",
                "c.yaml:4:9: admin.http: 9090 does not say which address; write 0.0.0.0:9090 for probes of the kubelet, or 127.0.0.1:9090",
            ),
            (
                "version: 1",
                "version: 1\nversion: 1",
                "c.yaml:3:1: the key \"version\" is written twice; keep one",
            ),
            ("  orders-db:", "  1db:", "\"1db\" is not a name; write a letter"),
            ("stale: true }", "stale: true", "is not usable YAML"),
        ] {
            let error = yaml(with(EXAMPLE, old, new)).expect_err(new);
            assert!(error.contains(expected), "{new}\n     got {error}\nexpected {expected}");
            assert!(error.starts_with("c.yaml:") && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_slip_in_toml_is_told_as_in_yaml() {
        for (old, new, expected) in [
            (
                "listen",
                "listn",
                "c.toml:3:1: routes[0].listn: unknown key \"listn\", did you mean \"listen\"?",
            ),
            (
                "\"2s\"",
                "2",
                "c.toml:7:23: upstreams.db.connect.timeout: integer `2` does not belong here; write a duration with its unit, such as 500ms, 2s or 5m",
            ),
            (
                "5432,",
                "0,",
                "c.toml:3:11: routes[0].listen[0]: port 0 would be a different port at every start",
            ),
            ("version = 1", "", "c.toml:1:1: the key \"version\" is missing; write version: 1"),
            ("version = 1", "version = 1\nversion = 1", "c.toml:2:1: is not TOML: duplicate key"),
            (
                "upstream = \"db\"",
                "upstream = \"bd\"",
                "c.toml:4:12: routes[0].upstream: there is no upstream \"bd\", did you mean \"db\"?",
            ),
        ] {
            let error = toml(with(TOML, old, new)).expect_err(new);
            assert!(error.contains(expected), "{new}\n     got {error}\nexpected {expected}");
        }
    }

    #[test]
    fn a_file_without_content_is_told_from_one_with_wrong_content() {
        for text in ["", "# nothing\n", "\n\n"] {
            assert!(
                yaml(text).unwrap_err().contains("the file is empty; write version: 1"),
                "{text}"
            );
        }
        assert!(yaml("- a").unwrap_err().contains("a mapping belongs here"));
        assert!(yaml("version: 1\n\0").unwrap_err().contains("c.yaml:2:1: is not usable YAML"));
        assert!(yaml("version: 1").unwrap_err().contains("--route 5432=orders-db.prod.svc:5432"));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let read = |path: &Path| Document::read(path).err().unwrap().to_string();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.yaml");
        let name = path.display();
        assert!(read(&path).starts_with(&format!("{name}: cannot be read: No such file")));
        std::fs::write(&path, b"version: 1\n# \xff").unwrap();
        assert_eq!(read(&path), format!("{name}:2:3: is not UTF-8 text; save the file as UTF-8"));
        std::fs::write(&path, vec![b'#'; 1 + (1 << 20)]).unwrap();
        assert_eq!(read(&path), format!("{name}: is larger than 1 MiB; write a smaller file"));
    }

    #[test]
    fn hostile_nesting_and_aliases_are_refused() {
        assert!(yaml("[".repeat(100_000)).is_err());
        assert!(yaml("a: &a [*a, *a]").is_err());
        let mut bomb = String::from("a0: &a0 [x]\n");
        for level in 1..30 {
            let below = level - 1;
            bomb.push_str(&format!("a{level}: &a{level} [*a{below}, *a{below}, *a{below}]\n"));
        }
        assert!(yaml(bomb).is_err());
        assert!(toml("[".repeat(100_000)).is_err());
        assert!(toml(format!("a = {}", "[".repeat(100_000))).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused_in_one_line(text in any::<String>()) {
            for error in [yaml(text.clone()).err(), toml(text).err()].into_iter().flatten() {
                prop_assert!(!error.chars().any(char::is_control), "{error:?}");
            }
        }

        #[test]
        fn one_changed_byte_is_read_or_refused_in_one_line(
            at in 0..EXAMPLE.len(),
            new in any::<u8>(),
        ) {
            let mut bytes = EXAMPLE.as_bytes().to_vec();
            bytes[at] = new;
            if let Err(error) = yaml(String::from_utf8_lossy(&bytes)) {
                prop_assert!(!error.chars().any(char::is_control), "{error:?}");
                prop_assert!(error.len() < 500, "{error}");
            }
        }
    }

    #[test]
    fn every_misspelt_key_is_refused_by_name() {
        let keys = [
            "version",
            "admin",
            "http",
            "control",
            "acceleration",
            "tier",
            "require",
            "drain",
            "grace",
            "deadline",
            "routes",
            "name",
            "listen",
            "upstream",
            "protocol",
            "max_connections",
            "idle_timeout",
            "socket_mode",
            "upstreams",
            "endpoints",
            "balance",
            "connect",
            "timeout",
            "attempts",
            "dns",
            "min_ttl",
            "max_ttl",
            "stale",
        ];
        for key in keys {
            let (at, _) = EXAMPLE
                .match_indices(&format!("{key}:"))
                .find(|(at, _)| EXAMPLE[..*at].ends_with([' ', '\n']))
                .expect(key);
            let text = format!("{}x{}", &EXAMPLE[..at], &EXAMPLE[at..]);
            let error = yaml(text).unwrap_err();
            assert!(error.contains(&format!("unknown key \"x{key}\"")), "{error}");
        }
    }
}

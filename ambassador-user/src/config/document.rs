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
use sha2::{Digest, Sha256};

use super::environment::Environment;
use super::file::FileText;
use super::layer::Layer;
use super::problem::{ConfigError, Place, Position, Problem, excerpt, nearest, quote};
use super::resolve::{Resolved, resolve};

/// The largest file that is read.
const MAX_BYTES: u64 = 1 << 20;

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

    /// What the file says where the environment is this.
    pub(crate) fn layer(&self, environment: &Environment) -> Result<Layer, ConfigError> {
        let parsed = self.format.parse(&self.text, PhantomData::<FileText>).map_err(|failure| {
            let place = Place::in_file(&self.file, failure.key).at(failure.position);
            self.locate(failure.problem.at(&place))
        })?;
        parsed.layer(&self.file, environment).map_err(|error| self.locate(error))
    }

    /// What tells it from any other text.
    pub(crate) fn sha256(&self) -> String {
        Sha256::digest(&self.text).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The error with its line and column, if it is about a key of this file.
    pub(crate) fn locate(&self, error: ConfigError) -> ConfigError {
        error.located(|key| self.format.locate(&self.text, key))
    }
}

impl Resolved {
    /// What `text` means as the only source, read as if it stood in `path` of another machine.
    pub fn of_text(path: &Path, text: String) -> Result<Self, ConfigError> {
        let document = Document::new(path, text);
        resolve(vec![document.layer(&Environment::elsewhere())?])
            .map_err(|error| document.locate(error))
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
mod tests;

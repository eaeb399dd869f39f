//! What is wrong with a configuration: one line that names the place, the problem and the fix.
//!
//! Everything quoted from the input is escaped and shortened, so that a hostile value can neither
//! break the line nor reach a terminal, and whatever stands before an `@` is hidden, because a
//! pasted URL may carry a password.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Why the configuration cannot be used. Its text is one line:
/// `FILE:LINE:COLUMN: PLACE: PROBLEM; FIX`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    place: Place,
    problem: Problem,
}

/// Something in the configuration that works, but hardly as it was meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    place: Place,
    problem: Problem,
}

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    file: Option<Arc<Path>>,
    position: Option<Position>,
    key: String,
}

/// A line and a column of a file, both counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    /// The line.
    pub(crate) line: u64,
    /// The column, in characters.
    pub(crate) column: u64,
}

/// What is wrong with one value, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    text: String,
}

impl ConfigError {
    pub(crate) fn new(place: Place, problem: Problem) -> Self {
        Self { place, problem }
    }

    /// The same error with its line and column, if `find` knows the key's.
    pub(crate) fn located(mut self, find: impl Fn(&str) -> Option<Position>) -> Self {
        if self.place.file.is_some() && self.place.position.is_none() {
            self.place.position = find(&self.place.key);
        }
        self
    }
}

impl Warning {
    pub(crate) fn new(place: Place, problem: Problem) -> Self {
        Self { place, problem }
    }
}

impl Place {
    /// A flag (`--tier`), a variable (`AMBASSADOR_TIER`) or a part of the whole (`routes`).
    pub(crate) fn named(name: impl Into<String>) -> Self {
        Self { file: None, position: None, key: name.into() }
    }

    /// A key of a file, written `routes[1].listen[0]`; empty for the file as a whole.
    pub(crate) fn in_file(file: &Arc<Path>, key: impl Into<String>) -> Self {
        Self { file: Some(file.clone()), position: None, key: key.into() }
    }

    /// The same place with its line and column.
    pub(crate) fn at(mut self, position: Option<Position>) -> Self {
        self.position = position;
        self
    }

    /// A key below this place.
    pub(crate) fn key(&self, key: impl fmt::Display) -> Self {
        let key = match self.key.as_str() {
            "" => key.to_string(),
            parent => format!("{parent}.{key}"),
        };
        Self { file: self.file.clone(), position: None, key }
    }

    /// An element of the list at this place.
    pub(crate) fn index(&self, index: usize) -> Self {
        Self { key: format!("{}[{index}]", self.key), position: None, file: self.file.clone() }
    }

    /// Who said so: the file, or else the flag or variable.
    pub(crate) fn source(&self) -> String {
        match &self.file {
            Some(file) => one_line(&file.display().to_string()),
            None => self.key.clone(),
        }
    }
}

impl Problem {
    /// `what` is wrong; `fix` says what to write instead.
    pub fn new(what: impl fmt::Display, fix: impl fmt::Display) -> Self {
        Self { text: format!("{what}; {fix}") }
    }

    /// `what` is wrong, and was most likely meant to be `near`.
    pub(crate) fn slip(what: impl fmt::Display, near: &str) -> Self {
        Self { text: format!("{what}, did you mean {near:?}?") }
    }

    /// A problem that a parser of files has carried as its own error's text.
    pub(crate) fn carried(text: &str) -> Self {
        Self { text: text.to_owned() }
    }

    /// The problem with this place in front.
    pub(crate) fn at(self, place: &Place) -> ConfigError {
        ConfigError::new(place.clone(), self)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_line(f, &self.place, &self.problem)
    }
}

impl std::error::Error for ConfigError {}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_line(f, &self.place, &self.problem)
    }
}

fn write_line(f: &mut fmt::Formatter<'_>, place: &Place, problem: &Problem) -> fmt::Result {
    let place = place.to_string();
    let colon = if place.is_empty() { "" } else { ": " };
    f.write_str(&one_line(&format!("{place}{colon}{problem}")))
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}", file.display())?;
            if let Some(Position { line, column }) = self.position {
                write!(f, ":{line}:{column}")?;
            }
            if !self.key.is_empty() {
                f.write_str(": ")?;
            }
        }
        f.write_str(&self.key)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Problem {}

/// `text` as it may stand in an error: quoted, escaped, shortened, without credentials.
pub(crate) fn quote(text: &str) -> String {
    format!("{:?}", excerpt(text))
}

/// `text` shortened and without credentials.
pub(crate) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 80;
    let (hidden, shown) = match text.rsplit_once('@') {
        Some((before, after)) if !before.is_empty() => ("***@", after),
        _ => ("", text),
    };
    let more = if shown.chars().nth(LONGEST).is_some() { "..." } else { "" };
    format!("{hidden}{}{more}", shown.chars().take(LONGEST).collect::<String>())
}

/// `text` with its control characters escaped, so that it stays on one line.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut line, character| {
        if character.is_control() || matches!(character, '\u{2028}' | '\u{2029}') {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
        line
    })
}

/// The candidate that `word` was most likely meant to be.
pub(crate) fn nearest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    // Distance is quadratic in the length: a megabyte of a key is nobody's slip.
    let word = word.chars().take(64).collect::<String>().to_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&word, &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= (candidate.len() / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_that_names_file_place_problem_and_fix() {
        let file: Arc<Path> = Path::new("a\nb.yaml").into();
        let place = Place::in_file(&file, "routes").index(1).key("listen").index(0);
        let place = place.at(Some(Position { line: 3, column: 7 }));
        let error = Problem::new("port 0 is \u{1b}[31mnot a port", "write 1 to 65535").at(&place);
        assert_eq!(
            error.to_string(),
            "a\\nb.yaml:3:7: routes[1].listen[0]: port 0 is \\u{1b}[31mnot a port; write 1 to 65535"
        );
    }

    #[test]
    fn a_quoted_value_is_escaped_shortened_and_free_of_credentials() {
        assert_eq!(quote("a\0b\n"), r#""a\0b\n""#);
        assert_eq!(quote("redis://user:secret@host:6379"), r#""***@host:6379""#);
        assert!(quote(&"x".repeat(1 << 20)).len() < 100);
    }

    #[test]
    fn the_nearest_candidate_is_named_only_when_it_is_near() {
        let keys = ["name", "listen", "max_connections"];
        assert_eq!(nearest("max_conections", keys), Some("max_connections"));
        assert_eq!(nearest("Listen", keys), Some("listen"));
        assert_eq!(nearest("certificate", keys), None);
    }
}

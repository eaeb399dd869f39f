//! The settings that are one of a few words, each spelled once.

use super::problem::{Problem, nearest, quote};

/// The word's value in a fixed list, or a refusal that names the list.
pub(super) fn one_of<T: Copy>(
    text: &str,
    kind: &str,
    words: &[(&'static str, T)],
    later: &[&str],
) -> Result<T, Problem> {
    if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
        return Ok(*value);
    }
    let list = words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
    if later.contains(&text) {
        return Err(Problem::new(
            format!("{kind} {text} is not in this release"),
            format!("write {list}"),
        ));
    }
    let what = format!("{} is not a {kind}", quote(text));
    Err(match nearest(text, words.iter().map(|(word, _)| *word)) {
        Some(near) => Problem::slip(what, near),
        None => Problem::new(what, format!("write {list}")),
    })
}

/// How an enum is read, written and described whose variants are words; `also` are other words for some.
macro_rules! words {
    (
        $type:ty, a $kind:literal, expected $expected:literal:
        $($word:literal = $variant:ident),+ $(; also $($other:literal = $meant:ident),+)?
    ) => {
        impl std::str::FromStr for $type {
            type Err = $crate::config::problem::Problem;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let words = [
                    $(($word, Self::$variant),)+
                    $($(($other, Self::$meant),)+)?
                ];
                $crate::config::words::one_of(text, $kind, &words, &[])
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self {
                    $(Self::$variant => $word,)+
                })
            }
        }

        impl $crate::config::text::Written for $type {
            const EXPECTED: &'static str = $expected;

            fn schema() -> schemars::Schema {
                let words = [$($word,)+ $($($other,)+)?];
                schemars::json_schema!({ "type": "string", "enum": words })
            }
        }
    };
}

pub(super) use words;

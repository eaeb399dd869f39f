//! `check`: what a service is asked, to learn whether it is well.
//!
//! ```text
//! CHECK     none | tcp | redis | postgres | mysql | http | http:/PATH | OPTIONS
//! OPTIONS   { redis: {...} } | { postgres: {...} } | { http: {...} }
//! ```

mod value;

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, Visitor};

use super::problem::Problem;
use super::text::Text;
use super::words::one_of;
pub use value::{Account, HttpHost, HttpPath, PasswordFile, Role, Statuses};

/// What a service is asked, and what it has to answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// To accept a connection, which whoever asks anything has seen already.
    Tcp,
    Redis(AskRedis),
    /// Whether it lets a user in, or without one, whether it answers at all.
    Postgres(Option<PostgresLogin>),
    Mysql,
    Http(AskHttp),
}

/// `PING`, after a login where there is one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AskRedis {
    pub login: Option<RedisLogin>,
    pub role: Option<Role>,
}

/// Whom Redis lets in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedisLogin {
    /// `None`: Redis' `default`.
    pub user: Option<String>,
    pub password_file: PathBuf,
}

/// Who is to be let in by PostgreSQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostgresLogin {
    pub user: String,
    /// `None`: that it asks for a password is answer enough, unless a role is wanted.
    pub password_file: Option<PathBuf>,
    /// `None`: that of the user's name.
    pub database: Option<String>,
    pub role: Option<Role>,
}

/// `GET path`, without TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AskHttp {
    pub path: String,
    pub status: Statuses,
    /// The header `Host`; `None`: where the service was reached.
    pub host: Option<String>,
}

/// CHECK in a file; `None`: nothing is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckText(pub Option<Ask>);

/// One of these.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping with the key redis, postgres or http")]
#[schemars(rename = "check")]
struct OptionsText {
    redis: Option<RedisText>,
    postgres: Option<PostgresText>,
    http: Option<HttpText>,
}

/// Redis has to answer PING.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping with keys such as password_file and role")]
#[schemars(rename = "redis")]
struct RedisText {
    /// The user of the password; the default is Redis' own.
    user: Option<Text<Account>>,
    /// The file with the password, read at each check.
    password_file: Option<Text<PasswordFile>>,
    /// What it has to be.
    role: Option<Text<Role>>,
}

/// PostgreSQL has to answer; with a user it has to let that in, or to ask for a password where none is given.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping with keys such as user and role")]
#[schemars(rename = "postgres")]
struct PostgresText {
    /// Who logs in.
    user: Option<Text<Account>>,
    /// The file with the password, read at each check.
    password_file: Option<Text<PasswordFile>>,
    /// Where the user logs in; the default is the database of the user's name.
    database: Option<Text<Account>>,
    /// What it has to be: the primary takes writes.
    role: Option<Text<Role>>,
}

/// An HTTP server has to answer a GET, in plain text.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping with keys such as path and status")]
#[schemars(rename = "http")]
struct HttpText {
    /// What is asked for.
    #[schemars(extend("default" = "/"))]
    path: Option<Text<HttpPath>>,
    /// The status codes that are well.
    #[schemars(extend("default" = "200-399"))]
    status: Option<Text<Statuses>>,
    /// The header Host; the default is the endpoint.
    host: Option<Text<HttpHost>>,
}

impl OptionsText {
    fn meaning(self) -> Result<Ask, Problem> {
        match self {
            Self { redis: Some(redis), postgres: None, http: None } => redis.meaning(),
            Self { redis: None, postgres: Some(postgres), http: None } => postgres.meaning(),
            Self { redis: None, postgres: None, http: Some(http) } => Ok(http.meaning()),
            _ => Err(Problem::new("this is not one check", "write one of redis, postgres, http")),
        }
    }
}

impl RedisText {
    fn meaning(self) -> Result<Ask, Problem> {
        let login = match (self.user, self.password_file) {
            (user, Some(Text(PasswordFile(password_file)))) => {
                Some(RedisLogin { user: user.map(|user| user.0.0), password_file })
            }
            (Some(_), None) => {
                return Err(Problem::new("the user has no password", "add password_file"));
            }
            (None, None) => None,
        };
        Ok(Ask::Redis(AskRedis { login, role: self.role.map(|role| role.0) }))
    }
}

impl PostgresText {
    fn meaning(self) -> Result<Ask, Problem> {
        let alone = self.password_file.is_none() && self.database.is_none() && self.role.is_none();
        let login = match self.user {
            Some(Text(Account(user))) => Some(PostgresLogin {
                user,
                password_file: self.password_file.map(|file| file.0.0),
                database: self.database.map(|database| database.0.0),
                role: self.role.map(|role| role.0),
            }),
            None if alone => None,
            None => return Err(Problem::new("nobody is to log in", "add user")),
        };
        Ok(Ask::Postgres(login))
    }
}

impl HttpText {
    fn meaning(self) -> Ask {
        let default = AskHttp::default();
        Ask::Http(AskHttp {
            path: self.path.map_or(default.path, |path| path.0.0),
            status: self.status.map_or(default.status, |status| status.0),
            host: self.host.map(|host| host.0.0),
        })
    }
}

impl Default for AskHttp {
    fn default() -> Self {
        Self { path: "/".to_owned(), status: Statuses::default(), host: None }
    }
}

impl FromStr for CheckText {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        if let Some(path) = text.strip_prefix("http:") {
            let HttpPath(path) = path.parse()?;
            return Ok(Self(Some(Ask::Http(AskHttp { path, ..AskHttp::default() }))));
        }
        type Meaning = fn() -> Option<Ask>;
        let words: [(_, Meaning); 6] = [
            ("none", || None),
            ("tcp", || Some(Ask::Tcp)),
            ("redis", || Some(Ask::Redis(AskRedis::default()))),
            ("postgres", || Some(Ask::Postgres(None))),
            ("mysql", || Some(Ask::Mysql)),
            ("http", || Some(Ask::Http(AskHttp::default()))),
        ];
        Ok(Self(one_of(text, "check", &words, &[])?()))
    }
}

/// What it is, without its options.
impl fmt::Display for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => f.write_str("tcp"),
            Self::Redis(_) => f.write_str("redis"),
            Self::Postgres(_) => f.write_str("postgres"),
            Self::Mysql => f.write_str("mysql"),
            Self::Http(ask) => write!(f, "http:{}", ask.path),
        }
    }
}

impl<'de> Deserialize<'de> for CheckText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CheckVisitor)
    }
}

struct CheckVisitor;

impl<'de> Visitor<'de> for CheckVisitor {
    type Value = CheckText;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a check: none, tcp, redis, postgres, mysql or http:/PATH, or one with options")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<CheckText, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CheckText, A::Error> {
        let options = OptionsText::deserialize(MapAccessDeserializer::new(map))?;
        options.meaning().map(|ask| CheckText(Some(ask))).map_err(A::Error::custom)
    }
}

impl JsonSchema for CheckText {
    fn schema_name() -> Cow<'static, str> {
        "Check".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                {
                    "type": "string",
                    "pattern": "^(none|tcp|redis|postgres|mysql|http|http:/[!-~]*)$",
                    "examples": ["none", "tcp", "redis", "postgres", "mysql", "http:/healthz"],
                },
                generator.subschema_for::<OptionsText>(),
            ]
        })
    }
}

#[cfg(test)]
mod tests;

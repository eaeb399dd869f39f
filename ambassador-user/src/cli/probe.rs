//! `ambassador probe`: what can be typed to probe a service.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::timeout;
use crate::config::{
    Account, Ask, AskHttp, AskRedis, HttpHost, HttpPath, PostgresLogin, Problem, RedisLogin, Role,
    Statuses, Target, quote,
};

/// How a service is probed.
#[derive(Debug, Subcommand)]
pub enum Probe {
    /// Exit 0 if TARGET accepts a connection, 1 if not
    #[command(
        after_help = "It connects as an app does. Where the ambassador relays a connection to TARGET, it is
the ambassador that accepts, whether or not the upstream does; where the route is `direct`, it is
the upstream.

Examples:
  ambassador probe tcp 127.0.0.1:5432
  ambassador probe tcp unix:/var/run/db/postgres.sock --timeout 500ms"
    )]
    Tcp(ProbeArgs),
    /// Exit 0 if Redis at TARGET answers PING, 1 if not
    #[command(after_help = "Examples:
  ambassador probe redis 127.0.0.1:6379
  ambassador probe redis redis-0:6379 --password-file /run/secrets/redis/password --role primary")]
    Redis {
        #[command(flatten)]
        probe: ProbeArgs,
        /// The user of the password [default: that of Redis]
        #[arg(long, requires = "password_file")]
        user: Option<Account>,
        /// The file with the password
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
        /// What it has to be: primary (or master), or replica
        #[arg(long)]
        role: Option<Role>,
    },
    /// Exit 0 if PostgreSQL at TARGET answers, 1 if not
    #[command(
        after_help = "Without a user it has to answer at all, in whatever state the database is. With one it has
to let that in, or to ask for a password where none is given.

Examples:
  ambassador probe postgres 127.0.0.1:5432
  ambassador probe postgres 127.0.0.1:5432 --user orders
  ambassador probe postgres db-0:5432 --user probe --password-file /run/secrets/db --role primary"
    )]
    Postgres {
        #[command(flatten)]
        probe: ProbeArgs,
        /// Who logs in
        #[arg(long)]
        user: Option<Account>,
        /// The file with the password
        #[arg(long, value_name = "FILE", requires = "user")]
        password_file: Option<PathBuf>,
        /// Where the user logs in [default: the database of the user's name]
        #[arg(long, value_name = "NAME", requires = "user")]
        database: Option<Account>,
        /// What it has to be: primary, which takes writes, or replica
        #[arg(long, requires = "user")]
        role: Option<Role>,
    },
    /// Exit 0 if MySQL or MariaDB at TARGET lets clients log in, 1 if not
    #[command(
        after_help = "It hears the greeting and tries to log in as `ambassador` without a password, because a server
locks out those who hear the greeting and go. That it is refused is well. With a user of that name,
without a password and without privileges, nothing is counted or logged.

Example:
  ambassador probe mysql 127.0.0.1:3306"
    )]
    Mysql(ProbeArgs),
    /// Exit 0 if an HTTP server answers a GET with a status that is well, 1 if not
    #[command(after_help = "Examples:
  ambassador probe http 127.0.0.1:8080/healthz
  ambassador probe http unix:/run/app.sock:/healthz --status 200 --host app.example.com")]
    Http {
        /// HOST:PORT, [IP6]:PORT or unix:PATH, then the path of the URL, as in HOST:PORT/healthz or
        /// unix:PATH:/healthz [default path: /]
        target: HttpTarget,
        /// The status that is well, or a range
        #[arg(long, default_value_t)]
        status: Statuses,
        /// The header Host [default: TARGET]
        #[arg(long)]
        host: Option<HttpHost>,
        /// How long to try
        #[arg(long, default_value = "1s", value_parser = timeout)]
        timeout: Duration,
    },
}

/// What every probe needs.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// HOST:PORT, [IP6]:PORT or unix:PATH
    target: Target,
    /// How long to try
    #[arg(long, default_value = "1s", value_parser = timeout)]
    timeout: Duration,
}

/// Where an HTTP server is, and what it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpTarget {
    target: Target,
    path: HttpPath,
}

impl Probe {
    /// Where to ask what, and for how long.
    pub fn meaning(self) -> (Target, Ask, Duration) {
        let (ProbeArgs { target, timeout }, ask) = match self {
            Self::Tcp(probe) => (probe, Ask::Tcp),
            Self::Redis { probe, user, password_file, role } => {
                let user = user.map(|Account(user)| user);
                let login = password_file.map(|password_file| RedisLogin { user, password_file });
                (probe, Ask::Redis(AskRedis { login, role }))
            }
            Self::Postgres { probe, user, password_file, database, role } => {
                let database = database.map(|Account(database)| database);
                let login =
                    user.map(|Account(user)| PostgresLogin { user, password_file, database, role });
                (probe, Ask::Postgres(login))
            }
            Self::Mysql(probe) => (probe, Ask::Mysql),
            Self::Http { target: HttpTarget { target, path }, status, host, timeout } => {
                let host = host.map(|HttpHost(host)| host);
                let ask = Ask::Http(AskHttp { path: path.0, status, host });
                (ProbeArgs { target, timeout }, ask)
            }
        };
        (target, ask, timeout)
    }
}

impl FromStr for HttpTarget {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        if text.contains("://") {
            return Err(Problem::new(
                format!("{} is a URL", quote(text)),
                "write HOST:PORT/PATH, without scheme; TLS is not spoken",
            ));
        }
        // A Unix socket has a path of its own, which ends at a colon, as nginx and curl write it.
        let (target, path) = match text.strip_prefix("unix:").map(|path| path.split_once(":/")) {
            Some(Some((socket, path))) => (&text[.."unix:".len() + socket.len()], path),
            Some(None) => (text, ""),
            None => text.split_once('/').unwrap_or((text, "")),
        };
        Ok(Self { target: target.parse()?, path: format!("/{path}").parse()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_a_url_follows_its_target() {
        for (text, target, path) in [
            ("db:80", "db:80", "/"),
            ("db:80/", "db:80", "/"),
            ("[::1]:80/a/b?c=/d", "[::1]:80", "/a/b?c=/d"),
            ("unix:/run/a.sock", "unix:/run/a.sock", "/"),
            ("unix:/run/a.sock:/healthz", "unix:/run/a.sock", "/healthz"),
            ("unix:/run/a.sock:/a:/b", "unix:/run/a.sock", "/a:/b"),
        ] {
            let parsed: HttpTarget = text.parse().unwrap();
            let wanted =
                HttpTarget { target: target.parse().unwrap(), path: path.parse().unwrap() };
            assert_eq!(parsed, wanted, "{text}");
        }
        for text in ["http://db:80/", "db/healthz", "db:80/a b", "/healthz"] {
            assert!(text.parse::<HttpTarget>().is_err(), "{text}");
        }
    }
}

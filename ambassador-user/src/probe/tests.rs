//! What servers may say to a probe, friendly and hostile. Real ones are in `tests/tests/probe.rs`.

use std::io::Write;

use proptest::prelude::*;
use tempfile::NamedTempFile;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::*;
use crate::config::{AskHttp, AskRedis, PostgresLogin, RedisLogin, Role};

/// What the server does after its last words.
#[derive(Clone, Copy, PartialEq)]
enum Then {
    Close,
    Stay,
    /// Says the last of them again and again.
    Repeat,
}

/// How `ask` judges a server that says these words, each after it was asked something, but for the first of MySQL.
fn judged(ask: &Ask, said: &[&[u8]], then: Then) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (client, mut server) = duplex(1 << 16);
        let serve = async {
            for (turn, words) in said.iter().enumerate() {
                if turn > 0 || *ask != Ask::Mysql {
                    let mut asked = [0; 4096];
                    let _ = server.read(&mut asked).await;
                }
                let _ = server.write_all(words).await;
            }
            match then {
                Then::Close => drop(server),
                Then::Stay => std::future::pending().await,
                Then::Repeat => while server.write_all(said.last().unwrap()).await.is_ok() {},
            }
            // The verdict is awaited, not the server.
            std::future::pending::<()>().await;
        };
        let within = tokio::time::timeout(Duration::from_secs(5), answers(ask, "db:1", client));
        tokio::select! {
            verdict = within => match verdict {
                Ok(verdict) => verdict.map_err(|error| format!("{error:#}")),
                Err(_elapsed) => Err("silence".to_owned()),
            },
            () = serve => unreachable!(),
        }
    })
}

fn secret(text: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text).unwrap();
    file
}

fn redis(password: Option<&NamedTempFile>, role: Option<Role>) -> Ask {
    let login =
        password.map(|file| RedisLogin { user: None, password_file: file.path().to_owned() });
    Ask::Redis(AskRedis { login, role })
}

fn postgres(password: Option<&NamedTempFile>, role: Option<Role>) -> Ask {
    let password_file = password.map(|file| file.path().to_owned());
    Ask::Postgres(Some(PostgresLogin {
        user: "me".to_owned(),
        password_file,
        database: None,
        role,
    }))
}

/// A message of PostgreSQL.
fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
    [&[tag][..], &length, body].concat()
}

/// A packet of MySQL.
fn packet(sequence: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_le_bytes();
    [&length[..3], &[sequence], payload].concat()
}

/// The greeting of a server that is asked to log in by a plugin of this name.
fn greeting(plugin: &[u8]) -> Vec<u8> {
    let mut payload = b"\x0a8.4.0\0\x01\0\0\0saltsalt\0\xff\xf7\x21\x02\0\xff\xdf\x15".to_vec();
    payload.extend_from_slice(&[0; 10]);
    payload.extend_from_slice(b"saltsaltsalt\0");
    payload.extend_from_slice(plugin);
    payload.push(0);
    packet(0, &payload)
}

/// Every kind of question, with a password where there may be one.
fn questions(password: &NamedTempFile) -> Vec<Ask> {
    vec![
        redis(None, None),
        redis(Some(password), Some(Role::Primary)),
        Ask::Postgres(None),
        postgres(None, None),
        postgres(Some(password), Some(Role::Primary)),
        Ask::Mysql,
        Ask::Http(AskHttp::default()),
    ]
}

#[test]
fn a_hostile_server_is_refused_in_one_line_and_in_bounds() {
    let password = secret(b"secret");
    let steady = message(b'S', b"a\0b\0");
    let more = packet(1, b"\xfe");
    for ask in questions(&password) {
        for (said, then) in [
            (&b""[..], Then::Close),
            (b"H", Then::Close),
            (b"\x1b[31m\r\n\xff\xfe\0garbage", Then::Close),
            (b"x", Then::Repeat),
            (b"\n", Then::Repeat),
            (b"\r\n", Then::Repeat),
            (b"*1\r\n", Then::Repeat),
            (b"$9\r\n", Then::Repeat),
            (b"\0\0\0\0", Then::Repeat),
            (b"\xff\xff\xff\xff", Then::Repeat),
            (&steady, Then::Repeat),
            (&more, Then::Repeat),
        ] {
            let verdict = judged(&ask, &[said], then);
            if ask == Ask::Mysql && said == more {
                continue;
            }
            let refusal = verdict.expect_err(&format!("{ask:?}: {said:?}"));
            assert_ne!(refusal, "silence", "{ask:?}: {said:?}");
            assert!(!refusal.chars().any(char::is_control), "{ask:?}: {refusal}");
            assert!(refusal.len() < 1500, "{ask:?}: {refusal}");
        }
    }
}

#[test]
fn a_length_is_not_believed() {
    let huge = [b'R', 0x7f, 0xff, 0xff, 0xff];
    for ask in [Ask::Postgres(None), postgres(None, None)] {
        let refusal = judged(&ask, &[&huge], Then::Stay).unwrap_err();
        assert!(refusal.contains("not a message"), "{refusal}");
    }
    let refusal = judged(&Ask::Mysql, &[&huge], Then::Stay).unwrap_err();
    assert!(refusal.contains("not a packet"), "{refusal}");
}

#[test]
fn silence_is_for_the_caller_to_bound() {
    let ask = redis(None, None);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let verdict = runtime.block_on(async {
        let (client, _server) = duplex(64);
        tokio::time::timeout(Duration::from_millis(20), answers(&ask, "db:1", client)).await
    });
    assert!(verdict.is_err(), "silence was an answer");
}

#[test]
fn redis_answers_in_its_words() {
    let ask = redis(None, None);
    assert_eq!(judged(&ask, &[b"+PONG\r\n"], Then::Stay), Ok(()));
    for words in ["-LOADING Redis is loading", "-MASTERDOWN Link with MASTER is down", "+OK"] {
        let refusal = judged(&ask, &[format!("{words}\r\n").as_bytes()], Then::Stay);
        assert_eq!(refusal, Err(format!("redis: {words}")));
    }
    let refusal = judged(&ask, &[b"-NOAUTH Authentication required.\r\n"], Then::Stay).unwrap_err();
    assert_eq!(refusal, "redis: -NOAUTH Authentication required. Give a password file.");
}

#[test]
fn redis_has_a_role_by_either_command() {
    let pong = &b"+PONG\r\n"[..];
    let info = b"$40\r\n# Replication\r\nrole:slave\r\nmaster_host:db\r\n";
    for (said, is) in [
        (&[pong, b"*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n"][..], Role::Primary),
        (&[pong, b"*5\r\n$5\r\nslave\r\n"], Role::Replica),
        (&[pong, b"-ERR unknown command 'ROLE'\r\n", info], Role::Replica),
    ] {
        for wanted in [Role::Primary, Role::Replica] {
            let verdict = judged(&redis(None, Some(wanted)), said, Then::Stay);
            assert_eq!(verdict.is_ok(), is == wanted, "{wanted}: {verdict:?}");
        }
    }
    let denied = &b"-NOPERM this user has no permissions\r\n"[..];
    let refusal = judged(&redis(None, Some(Role::Primary)), &[pong, denied, denied], Then::Stay);
    assert!(refusal.unwrap_err().contains("-NOPERM"));
}

#[test]
fn a_password_is_never_repeated() {
    let password = secret(b"s3cr3t-of-redis\n");
    for words in [
        "-ERR unknown command 'AUTH', with args beginning with: 's3cr3t-of-redis'",
        "-ERR unknown command 'AUTH', with args beginning with: 's3cr3",
    ] {
        let said = format!("{words}\r\n");
        let refusal =
            judged(&redis(Some(&password), None), &[said.as_bytes()], Then::Stay).unwrap_err();
        assert!(!refusal.contains("s3c"), "{refusal}");
    }
    let said = b"-WRONGPASS invalid username-password pair\r\n";
    let refusal = judged(&redis(Some(&password), None), &[said], Then::Stay).unwrap_err();
    assert!(refusal.contains("-WRONGPASS invalid"), "{refusal}");
}

#[test]
fn a_password_is_what_its_file_says_now() {
    for (text, is) in
        [("a", "a"), ("a b\n", "a b"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("\ra", "\ra")]
    {
        assert_eq!(password(secret(text.as_bytes()).path()).unwrap(), is.as_bytes(), "{text:?}");
    }
    for text in [&b""[..], b"\n", &[b'a'; 2000]] {
        assert!(password(secret(text).path()).is_err());
    }
    let refusal = password(Path::new("/no/such/file")).unwrap_err();
    assert!(format!("{refusal:#}").contains("/no/such/file"));

    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    assert!(password(&fifo).is_err(), "a FIFO has a password");
}

#[test]
fn postgres_says_that_it_is_there_or_why_not() {
    let error = |code: &str| message(b'E', format!("SFATAL\0C{code}\0Mnot now\0\0").as_bytes());
    let ask = Ask::Postgres(None);
    assert_eq!(judged(&ask, &[b"N"], Then::Stay), Ok(()));
    assert_eq!(judged(&ask, &[b"G"], Then::Stay), Ok(()));
    // A server before 12 does not know the question.
    assert_eq!(judged(&ask, &[&error("0A000")], Then::Close), Ok(()));
    let refusal = "postgres: FATAL: not now (57P03)".to_owned();
    assert_eq!(judged(&ask, &[&error("57P03")], Then::Close), Err(refusal.clone()));
    assert_eq!(judged(&postgres(None, None), &[&error("57P03")], Then::Close), Err(refusal));
}

#[test]
fn postgres_is_told_no_password_in_clear_and_hashes_none_for_ever() {
    let password = secret(b"secret");
    let ask = postgres(Some(&password), None);
    let clear = message(b'R', &[0, 0, 0, 3]);
    let refusal = judged(&ask, &[&clear], Then::Stay).unwrap_err();
    assert!(refusal.contains("in clear"), "{refusal}");
    // That it asks is answer enough where there is no password to be told.
    assert_eq!(judged(&postgres(None, None), &[&clear], Then::Stay), Ok(()));
    let refusal = judged(&postgres(None, Some(Role::Primary)), &[&clear], Then::Stay).unwrap_err();
    assert!(refusal.contains("give a password file"), "{refusal}");

    let scram = message(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0");
    let forever = message(b'R', b"\0\0\0\x0br=nonce,s=c2FsdA==,i=4294967295");
    let refusal = judged(&ask, &[&scram, &forever], Then::Stay).unwrap_err();
    assert!(refusal.contains("too long"), "{refusal}");
    let other = message(b'R', b"\0\0\0\x0aSCRAM-SHA-1\0\0");
    let refusal = judged(&ask, &[&other], Then::Stay).unwrap_err();
    assert!(refusal.contains("SCRAM-SHA-256"), "{refusal}");
}

#[test]
fn mysql_greets_or_says_why_not() {
    let native = greeting(b"mysql_native_password");
    let denied = packet(2, b"\xff\x15\x04#28000Access denied for user 'ambassador'@'a'");
    let full = packet(2, b"\xff\x10\x04#08004Too many connections");
    let in_again = packet(2, b"\xfecaching_sha2_password\0saltsaltsaltsaltsalt\0");
    let ok = packet(2, b"\0\0\0\x02\0\0\0");
    for said in [&[&native[..], &denied][..], &[&native, &in_again, &denied], &[&native, &ok]] {
        assert_eq!(judged(&Ask::Mysql, said, Then::Stay), Ok(()));
    }
    let refusal = judged(&Ask::Mysql, &[&native, &full], Then::Stay);
    assert_eq!(refusal, Err("mysql: Too many connections (1040)".to_owned()));
    let blocked = packet(0, b"\xff\x69\x04Host 'a' is blocked");
    let refusal = judged(&Ask::Mysql, &[&blocked], Then::Close);
    assert_eq!(refusal, Err("mysql: Host 'a' is blocked (1129)".to_owned()));
}

#[test]
fn http_is_judged_by_its_status() {
    let ask = Ask::Http(AskHttp::default());
    for line in ["HTTP/1.1 200 OK", "HTTP/1.0 204", "HTTP/1.1 399 "] {
        assert_eq!(judged(&ask, &[format!("{line}\r\n").as_bytes()], Then::Stay), Ok(()), "{line}");
    }
    let refusal = judged(&ask, &[b"HTTP/1.1 503 Busy\r\n"], Then::Close);
    assert_eq!(refusal, Err("http: status 503, expected 200-399".to_owned()));
    for line in ["HTTP/2 200", "HTTP/1.1 20", "HTTP/1.1 2000", "HTTP/1.1  200", "SSH-2.0-x"] {
        let refusal = judged(&ask, &[format!("{line}\r\n").as_bytes()], Then::Stay).unwrap_err();
        assert_eq!(refusal, format!("http: not an answer of HTTP: {line}"));
    }
}

proptest! {
    #[test]
    fn whatever_is_said_is_judged(
        said in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..64), 1..4),
        tag in proptest::sample::select(&b"RSEKNTDZC"[..]),
    ) {
        let password = secret(b"secret");
        for ask in questions(&password) {
            let said: Vec<_> = said.iter().map(|body| match ask {
                Ask::Postgres(_) => message(tag, body),
                Ask::Mysql => packet(0, &[&b"\x0a"[..], body].concat()),
                _ => body.clone(),
            }).collect();
            // All at once, as the probe may wait for what the server would only say when asked.
            if let Err(refusal) = judged(&ask, &[&said.concat()], Then::Close) {
                prop_assert_ne!(&refusal, "silence");
                prop_assert!(!refusal.chars().any(char::is_control), "{}", refusal);
            }
        }
    }
}

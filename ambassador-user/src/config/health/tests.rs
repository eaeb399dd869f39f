//! What checks are read as, and how slips in them are told.

use super::*;

/// `text` as YAML.
fn check(text: &str) -> Result<Option<Ask>, String> {
    serde_saphyr::from_str::<CheckText>(text)
        .map(|CheckText(ask)| ask)
        .map_err(|error| error.to_string())
}

fn toml(text: &str) -> Result<Option<Ask>, String> {
    #[derive(Debug, Deserialize)]
    struct Whole {
        check: CheckText,
    }
    toml::from_str::<Whole>(text).map(|whole| whole.check.0).map_err(|error| error.to_string())
}

#[test]
fn a_check_is_a_word() {
    assert_eq!(check("none"), Ok(None));
    assert_eq!(check("tcp"), Ok(Some(Ask::Tcp)));
    assert_eq!(check("redis"), Ok(Some(Ask::Redis(AskRedis::default()))));
    assert_eq!(check("postgres"), Ok(Some(Ask::Postgres(None))));
    assert_eq!(check("mysql"), Ok(Some(Ask::Mysql)));
    assert_eq!(check("http"), Ok(Some(Ask::Http(AskHttp::default()))));
    let healthz = AskHttp { path: "/healthz?deep=1".to_owned(), ..AskHttp::default() };
    assert_eq!(check("http:/healthz?deep=1"), Ok(Some(Ask::Http(healthz.clone()))));
    assert_eq!(toml("check = \"http:/healthz?deep=1\""), Ok(Some(Ask::Http(healthz))));
}

#[test]
fn a_check_with_options_is_a_mapping() {
    let login = RedisLogin { user: None, password_file: "/run/p".into() };
    let redis = Ask::Redis(AskRedis { login: Some(login), role: Some(Role::Primary) });
    let text = "redis: { password_file: /run/p, role: master }";
    assert_eq!(check(text), Ok(Some(redis.clone())));
    let text = "check = { redis = { password_file = \"/run/p\", role = \"primary\" } }";
    assert_eq!(toml(text), Ok(Some(redis)));

    let postgres = Ask::Postgres(Some(PostgresLogin {
        user: "probe".to_owned(),
        password_file: Some("/run/p".into()),
        database: Some("orders".to_owned()),
        role: Some(Role::Replica),
    }));
    let text = "postgres: {user: probe, password_file: /run/p, database: orders, role: replica}";
    assert_eq!(check(text), Ok(Some(postgres)));
    assert_eq!(check("postgres: {}"), Ok(Some(Ask::Postgres(None))));

    for (status, meant) in [("204", 204..=204), ("200-299", 200..=299), ("\"200\"", 200..=200)] {
        let http = Ask::Http(AskHttp {
            path: "/healthz".to_owned(),
            status: Statuses(meant),
            host: Some("api.example.com:80".to_owned()),
        });
        let text =
            format!("http: {{ path: /healthz, status: {status}, host: 'api.example.com:80' }}");
        assert_eq!(check(&text), Ok(Some(http)));
    }
}

#[test]
fn a_slip_is_told_with_its_fix() {
    for (text, told) in [
        ("rediss", "did you mean \"redis\"?"),
        ("icmp", "write none, tcp, redis, postgres, mysql, http"),
        ("http:healthz", "not the path of a URL"),
        ("http:/a b", "not the path of a URL"),
        ("\"http:/a\\r\\nHost: b\"", "not the path of a URL"),
        ("3", "a check: none, tcp"),
        ("[tcp]", "a check: none, tcp"),
        ("{}", "not one check"),
        ("{ redis: {}, http: {} }", "not one check"),
        ("{ mysql: {} }", "mysql"),
        ("{ redis: { pasword_file: /p } }", "pasword_file"),
        ("{ redis: { password: secret } }", "password"),
        ("{ redis: { user: me } }", "add password_file"),
        ("{ redis: { role: leader } }", "write primary, replica, master"),
        ("{ redis: { password_file: secrets/p } }", "not the absolute path"),
        ("{ postgres: { role: primary } }", "add user"),
        ("{ postgres: { user: '' } }", "names nobody"),
        ("{ http: { status: 99 } }", "write 100 to 599"),
        ("{ http: { status: 300-200 } }", "write 100 to 599"),
        ("{ http: { status: 200-600 } }", "write 100 to 599"),
        ("{ http: { host: 'a b' } }", "is not a host"),
        ("{ http: { host: \"a\\r\\nb: c\" } }", "is not a host"),
    ] {
        let refusal = check(text).expect_err(text);
        assert!(refusal.contains(told), "{text}: {refusal}");
    }
}

#[test]
fn the_schema_tells_both_forms() {
    let schema = serde_json::to_value(schemars::schema_for!(CheckText)).unwrap();
    let schema = schema.to_string();
    for word in ["http:/healthz", "password_file", "primary", "200-399"] {
        assert!(schema.contains(word), "{word} is missing in {schema}");
    }
}

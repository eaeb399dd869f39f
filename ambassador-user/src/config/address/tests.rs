//! What the grammar of addresses accepts, and how it refuses the rest.

use proptest::prelude::*;

use super::*;

fn listen(text: &str) -> Result<ListenText, String> {
    text.parse().map_err(|problem: Problem| problem.to_string())
}

fn endpoint(text: &str) -> Result<EndpointText, String> {
    text.parse().map_err(|problem: Problem| problem.to_string())
}

#[test]
fn a_bare_port_is_both_loopbacks_and_ipv6_only_if_there_is_one() {
    let both = listen("5432").unwrap().meaning();
    let expected = [("127.0.0.1:5432", false), ("[::1]:5432", true)];
    let expected = expected.map(|(address, if_available)| Listen::Tcp {
        address: address.parse().unwrap(),
        if_available,
    });
    assert_eq!(both, expected);
}

#[test]
fn an_endpoint_is_a_name_an_address_or_a_socket() {
    let name = |host: &str, port| Target::Name { host: host.into(), port };
    let address = |text: &str| Target::Address(text.parse().unwrap());
    for (text, target, weight) in [
        ("db:5432", name("db", 5432), None),
        ("db.prod.svc.:5432:7", name("db.prod.svc.", 5432), Some(7)),
        ("_pg.3com-x:1", name("_pg.3com-x", 1), None),
        ("srv:5432:7", name("srv", 5432), Some(7)),
        ("srv:_pg._tcp.db.svc.", Target::Service("_pg._tcp.db.svc.".into()), None),
        ("srv:_pg._tcp.db.svc:7", Target::Service("_pg._tcp.db.svc".into()), Some(7)),
        ("10.0.0.7:80:1000", address("10.0.0.7:80"), Some(1000)),
        ("[fd00::1]:80:3", address("[fd00::1]:80"), Some(3)),
        ("[fe80::1%2]:80", address("[fe80::1%2]:80"), None),
        ("unix:/run/a b:5.sock", Target::Unix("/run/a b:5.sock".into()), None),
    ] {
        let weight = weight.and_then(NonZeroU16::new);
        assert_eq!(endpoint(text), Ok(EndpointText { target, weight }), "{text}");
    }
}

#[test]
fn a_bad_endpoint_is_refused_with_what_to_write_instead() {
    let long = format!("unix:/{}", "x".repeat(107));
    for (text, hint) in [
        ("", "write HOST:PORT"),
        ("db", "add :PORT"),
        (":5432", "write HOST:PORT"),
        ("db:0", "1 to 65535"),
        ("srv:db.svc", "write srv:_SERVICE._tcp.NAME"),
        ("srv:_pg._tcp", "write srv:_SERVICE._tcp.NAME"),
        ("srv:_pg.tcp.db", "write srv:_SERVICE._tcp.NAME"),
        ("srv:_pg._tcp.d b", "without spaces"),
        ("srv:_pg._tcp.db:0", "1 to 1000"),
        ("srv:", "write HOST:PORT"),
        ("db:+80", "1 to 65535"),
        ("db:080", "1 to 65535"),
        ("db:65536", "1 to 65535"),
        ("db:5432:0", "1 to 1000"),
        ("db:5432:1001", "1 to 1000"),
        ("db:5432:1:1", "1 to 1000"),
        ("::1:5432", "write [IP6]:PORT"),
        ("fe80::1", "write [IP6]:PORT"),
        ("[::1:80", "write [IP6]:PORT"),
        ("[::1]80", "write [IP6]:PORT"),
        ("[db]:80", "brackets around an IPv6 address only"),
        ("1.2.3:80", "A.B.C.D"),
        ("300.1.1.1:80", "A.B.C.D"),
        ("a..b:80", "labels"),
        ("-a:80", "without it"),
        ("käse:80", "xn--"),
        ("a b:80", "without spaces"),
        ("a\0b:80", "without spaces and control characters"),
        ("redis://u:secret@h:80", "without scheme"),
        ("/run/db.sock", "unix:PATH"),
        ("unix:", "unix:/absolute"),
        ("unix:db.sock", "from the root"),
        ("unix:@db", "unix:/PATH"),
        ("unix:/run/", "in it"),
        ("unix:/run/..", "in it"),
        ("unix:/run/\0", "printable"),
        (&long, "at most 107 bytes"),
    ] {
        let refusal = endpoint(text).expect_err(text);
        assert!(refusal.contains("; ") && refusal.contains(hint), "{text:?}: {refusal}");
        assert!(!refusal.contains("secret"), "{refusal}");
    }
    assert!(endpoint(&format!("{}:80", ["a"; 127].join("."))).is_ok());
    assert!(endpoint(&format!("{}:80", ["a"; 128].join("."))).is_err());
    assert!(endpoint(&long[..long.len() - 1]).is_ok());
}

#[test]
fn a_bad_listen_address_is_refused_with_what_to_write_instead() {
    for (text, hint) in [
        ("0", "1 to 65535"),
        ("70000", "1 to 65535"),
        ("localhost:80", "write 80 for localhost"),
        ("*:80", "0.0.0.0:80 for every interface"),
        (":80", "0.0.0.0:80 for every interface"),
        ("::1:80", "write [IP6]:PORT"),
        ("[::ffff:10.0.0.1]:80", "write 10.0.0.1:80"),
        ("127.0.0.1", "add :PORT"),
        ("/run/db.sock", "unix:PATH"),
    ] {
        let refusal = listen(text).expect_err(text);
        assert!(refusal.contains("; ") && refusal.contains(hint), "{text:?}: {refusal}");
    }
}

/// Text that is near the grammar, so that parsers get past their first step.
pub(crate) fn nearly_an_address() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        "[a-z0-9:.,=\\[\\]%/@*+ \\x00-\\x1f-]{0,40}",
        "(unix:)?/?[a-z/.]{0,120}",
        "\\[?[0-9a-f:.%]{0,30}\\]?:[0-9]{0,6}(:[0-9]{0,5})?",
    ]
}

pub(crate) fn any_target() -> impl Strategy<Value = Target> {
    let port = 1..=u16::MAX;
    let name = "[a-zA-Z_]([a-zA-Z0-9_-]{0,20}[a-z0-9])?(\\.[a-z][a-z0-9]{0,10}){0,4}\\.?";
    prop_oneof![
        (name, port.clone()).prop_map(|(host, port)| Target::Name { host: host.into(), port }),
        (any::<IpAddr>(), port).prop_map(|(ip, port)| Target::Address(SocketAddr::new(ip, port))),
        any_path().prop_map(Target::Unix),
        "_[a-z]{1,9}\\._[a-z]{1,5}(\\.[a-z][a-z0-9]{0,10}){1,4}\\.?"
            .prop_map(|name| Target::Service(name.into())),
    ]
}

pub(crate) fn any_path() -> impl Strategy<Value = PathBuf> {
    "(/[a-zA-Z0-9_. :-]{0,10}[a-z0-9]){1,8}".prop_map(PathBuf::from)
}

pub(crate) fn any_endpoint() -> impl Strategy<Value = EndpointText> {
    (any_target(), proptest::option::of(1..=MAX_WEIGHT)).prop_map(|(target, weight)| {
        let weight = weight.filter(|_| !matches!(target, Target::Unix(_)));
        EndpointText { target, weight: weight.and_then(NonZeroU16::new) }
    })
}

pub(crate) fn any_listen() -> impl Strategy<Value = ListenText> {
    let port = 1..=u16::MAX;
    prop_oneof![
        port.clone().prop_filter_map("not zero", NonZeroU16::new).prop_map(ListenText::Port),
        (any::<IpAddr>(), port).prop_map(|(ip, port)| {
            ListenText::Address(SocketAddr::new(ip.to_canonical(), port))
        }),
        any_path().prop_map(ListenText::Unix),
    ]
}

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused_in_one_line(text in nearly_an_address()) {
        for refusal in [listen(&text).err(), endpoint(&text).err()].into_iter().flatten() {
            prop_assert!(!refusal.chars().any(char::is_control), "{refusal:?}");
            prop_assert!(refusal.len() < 500, "{refusal}");
        }
    }

    #[test]
    fn what_is_accepted_is_written_back_to_the_same_meaning(text in nearly_an_address()) {
        if let Ok(parsed) = listen(&text) {
            prop_assert_eq!(listen(&parsed.to_string()), Ok(parsed));
        }
        if let Ok(parsed) = endpoint(&text) {
            prop_assert_eq!(endpoint(&parsed.to_string()), Ok(parsed));
        }
    }

    #[test]
    fn every_endpoint_survives_being_written_and_read(meant in any_endpoint()) {
        prop_assert_eq!(endpoint(&meant.to_string()), Ok(meant));
    }

    #[test]
    fn every_listen_address_survives_being_written_and_read(meant in any_listen()) {
        prop_assert_eq!(listen(&meant.to_string()), Ok(meant));
    }
}

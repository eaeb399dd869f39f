//! Which profile is chosen by what evidence, and what is told of the rest.

use crate::config::resolve::resolve;
use crate::config::{Config, Document, Resolved};

const FILE: &str = "version: 1
environment: { from: [env:APP, env:NS, namespace-suffix:/nowhere] }
routes: [{ listen: 1, upstream: a }, { listen: 2, upstream: b }]
upstreams:
  a: { profiles: { dev: 'a.dev:1', prod: ['a-0.prod:1', 'a-1.prod:1'] } }
  b: { profiles: { dev: 'b.dev:1', prod: 'b.prod:1' } }
";

fn read(text: &str, variables: &[(&str, &str)]) -> Result<Resolved, String> {
    let document = Document::new("c.yaml".as_ref(), text.to_owned());
    let environment = variables.iter().copied().collect();
    let layers = document.layer(&environment).map(|layer| vec![layer]);
    layers.and_then(resolve).map_err(|error| error.to_string())
}

fn with_default(default: &str) -> String {
    FILE.replace("/nowhere]", &format!("/nowhere], default: {default}"))
}

fn endpoints(config: &Config) -> Vec<String> {
    let endpoints = config.routes.iter().flat_map(|route| &route.upstream.endpoints);
    endpoints.map(|endpoint| endpoint.target.to_string()).collect()
}

#[test]
fn the_profile_that_all_evidence_names_is_in_force_in_every_upstream() {
    for (variables, evidence) in [
        (&[("APP", "prod")][..], "env:APP is \"prod\""),
        (&[("NS", " prod ")], "env:NS is \"prod\""),
        (&[("APP", "prod"), ("NS", "prod")], "env:APP is \"prod\" and env:NS is \"prod\""),
    ] {
        for text in [FILE, &with_default("dev")] {
            let Resolved { config, warnings, .. } = read(text, variables).unwrap();
            let profile = config.profile.clone().unwrap();
            assert_eq!((&*profile.name, &*profile.evidence), ("prod", evidence));
            assert_eq!(endpoints(&config), ["a-0.prod:1", "a-1.prod:1", "b.prod:1"]);
            assert_eq!(warnings, []);
        }
    }
}

#[test]
fn doubt_is_an_error_and_with_a_default_a_warning() {
    for (variables, doubt) in [
        (&[("APP", "prd")][..], "env:APP is \"prd\", which is none of dev, prod"),
        (&[("APP", "PROD")], "env:APP is \"PROD\", which is none of dev, prod"),
        (&[("APP", "prod"), ("NS", "orders-prod")], "env:NS is \"orders-prod\", which is none of"),
        (
            &[("APP", "dev"), ("NS", "prod")],
            "env:APP is \"dev\" and env:NS is \"prod\", which do not agree",
        ),
    ] {
        let error = read(FILE, variables).unwrap_err();
        assert!(error.starts_with(&format!("c.yaml:2:22: environment.from: {doubt}")), "{error}");
        assert!(error.ends_with("correct what it says, or write a default"), "{error}");

        let Resolved { config, warnings, .. } = read(&with_default("dev"), variables).unwrap();
        assert_eq!(endpoints(&config), ["a.dev:1", "b.dev:1"]);
        let evidence = config.profile.unwrap().evidence;
        assert!(evidence.starts_with(&format!("by default, since {doubt}")), "{evidence}");
        let [warning] = &warnings[..] else { panic!("{warnings:?}") };
        assert!(warning.to_string().contains(doubt), "{warning}");
    }
}

#[test]
fn without_evidence_there_is_the_default_or_an_error() {
    let absent = "env:APP or env:NS or namespace-suffix:/nowhere";
    for variables in [&[][..], &[("APP", "")], &[("APP", " "), ("OTHER", "prod")]] {
        let error = read(FILE, variables).unwrap_err();
        let told = format!("there is no {absent}; have it say one of dev, prod, or write a");
        assert!(error.contains(&told), "{error}");
        let Resolved { config, warnings, .. } = read(&with_default("dev"), variables).unwrap();
        assert_eq!(config.profile.unwrap().evidence, format!("by default, without {absent}"));
        assert_eq!(warnings, []);
    }
}

#[test]
fn evidence_that_cannot_be_read_is_an_error_whatever_the_default() {
    let text = with_default("dev").replace("/nowhere", "/");
    let error = read(&text, &[("APP", "dev")]).unwrap_err();
    assert!(error.contains("namespace-suffix:/ cannot be read: "), "{error}");
}

#[test]
fn profiles_that_cannot_be_meant_are_refused_whichever_is_in_force() {
    for (old, new, told) in [
        ("b.prod:1", "b.prod", "upstreams.b.profiles.prod: \"b.prod\" has no port"),
        ("'b.prod:1'", "[]", "upstreams.b.profiles.prod: the list is empty"),
        (", prod: 'b.prod:1'", ", staging: 'b:1'", ""),
        ("dev: 'b.dev:1', ", "", "upstreams.b.profiles: only prod is here, and dev is in force"),
        ("{ dev: 'b.dev:1', prod: 'b.prod:1' }", "{}", "upstreams.b.profiles: the list is empty"),
        ("dev: 'b.dev:1'", "1dev: 'b:1'", "\"1dev\" is not a name"),
        ("b: { ", "b: { endpoints: 'b:1', ", "upstreams.b: there are endpoints and profiles"),
        ("profiles: { dev: 'b.dev:1', prod: 'b.prod:1' }", "balance: failover", "add endpoints"),
        (
            "environment: { from: [env:APP, env:NS, namespace-suffix:/nowhere] }\n",
            "",
            "add environment",
        ),
        ("env:NS", "NS", "environment.from[1]: \"NS\" is not evidence"),
        (
            "[env:APP, env:NS, namespace-suffix:/nowhere]",
            "[]",
            "environment.from: the list is empty",
        ),
        (
            "/nowhere]",
            "/nowhere], default: stage",
            "environment.default: no upstream has a profile",
        ),
    ] {
        assert!(FILE.contains(old), "{old}");
        let read = read(&FILE.replacen(old, new, 1), &[("APP", "dev")]);
        if told.is_empty() {
            // Only where that is in force is it an error.
            let warnings = read.unwrap().warnings;
            assert_eq!(warnings.len(), 2, "{warnings:?}");
            assert!(warnings[1].to_string().contains("there is no prod, as in other upstreams"));
        } else {
            let error = read.map(|resolved| resolved.config).expect_err(new);
            assert!(error.contains(told) && error.starts_with("c.yaml:"), "{new}: {error}");
        }
    }
}

#[test]
fn evidence_for_nothing_is_not_looked_for() {
    let text = "version: 1
environment: { from: [env:APP] }
routes: [{ listen: 1, upstream: a }]
upstreams: { a: { endpoints: 'a:1' } }";
    let Resolved { config, warnings, .. } = read(text, &[]).unwrap();
    assert_eq!(config.profile, None);
    assert!(warnings[0].to_string().contains("environment: no upstream has profiles"));
}

#[test]
fn a_file_for_another_machine_is_read_by_its_default_or_any_profile() {
    let of = |text: &str| Resolved::of_text("c.yaml".as_ref(), text.to_owned()).unwrap().config;
    assert_eq!(&*of(FILE).profile.unwrap().name, "dev");
    assert_eq!(&*of(&with_default("prod")).profile.unwrap().name, "prod");
}

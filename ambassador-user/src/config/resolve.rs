//! From what was typed to what is meant: unites the sources and checks what only the whole shows.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::layer::{Draft, Layer, Said, Service, Settings};
use super::listeners::Listeners;
use super::name::Name;
use super::problem::{ConfigError, Place, Problem, Warning};
use super::{
    Acceleration, Admin, Config, Connect, Control, Dns, Drain, Eject, InFlight, OnUnhealthy, Route,
    TierLimit, Upstream,
};

/// A configuration, and how it came about.
#[derive(Debug)]
pub struct Resolved {
    /// What is meant.
    pub config: Config,
    /// What works, but hardly as it was meant.
    pub warnings: Vec<Warning>,
    /// Who said what is not a default: settings as `drain.grace`, routes as `routes.NAME`.
    pub origins: BTreeMap<String, String>,
    /// The SHA-256 of the file, if there is one.
    pub sha256: Option<String>,
}

/// Unites layers, the one with the highest precedence first.
pub(crate) fn resolve(layers: Vec<Layer>) -> Result<Resolved, ConfigError> {
    let mut settings = Settings::default();
    let mut drafts: Vec<Draft> = Vec::new();
    let (mut profile, mut warnings) = (None, Vec::new());
    let mut routes_at = Place::named("routes");
    for layer in layers {
        routes_at = layer.routes_at.unwrap_or(routes_at);
        settings = settings.or(layer.settings);
        profile = profile.or(layer.profile);
        warnings.extend(layer.warnings);
        add_routes(&mut drafts, layer.routes)?;
    }
    if drafts.is_empty() {
        return Err(Problem::new(
            "there are none, so there is nothing to do",
            "add one, such as --route 5432=orders-db.prod.svc:5432",
        )
        .at(&routes_at));
    }

    let mut origins = settings.origins();
    let acceleration = settings.acceleration()?;
    let admin = settings.admin();
    let drain = settings.drain()?;
    let drafts = named(drafts);
    Listeners::of(&drafts, &admin)?.refuse_cycles(&drafts)?;
    let mut routes = Vec::with_capacity(drafts.len());
    for (name, draft) in drafts {
        origins.insert(format!("routes.{name}"), draft.place.source());
        routes.push(draft.route(&name, &acceleration)?);
    }
    let config = Config { admin, acceleration, drain, profile, routes };
    Ok(Resolved { config, warnings, origins, sha256: None })
}

/// Adds the routes of a lower layer, except those that a higher one has replaced by name.
fn add_routes(drafts: &mut Vec<Draft>, lower: Vec<Draft>) -> Result<(), ConfigError> {
    let higher: HashSet<Name> = drafts.iter().filter_map(|draft| draft.name.clone()).collect();
    let mut seen: HashMap<Name, Place> = HashMap::new();
    for draft in lower {
        if let Some(name) = &draft.name {
            if higher.contains(name) {
                continue;
            }
            if let Some(first) = seen.insert(name.clone(), draft.place.clone()) {
                return Err(Problem::new(
                    format!("the name {name} is taken by {first}"),
                    "give this route another name",
                )
                .at(&draft.place));
            }
        }
        drafts.push(draft);
    }
    Ok(())
}

/// Gives the routes without a name one that nobody else has.
fn named(drafts: Vec<Draft>) -> Vec<(Name, Draft)> {
    let mut taken: HashSet<Name> = drafts.iter().filter_map(|draft| draft.name.clone()).collect();
    let name = |draft: Draft| -> (Name, Draft) {
        let name = draft.name.clone().unwrap_or_else(|| {
            let name = Name::derived(&draft.service.endpoints()[0].target, &draft.listen[0].value);
            name.unique(|name| taken.contains(name))
        });
        taken.insert(name.clone());
        (name, draft)
    };
    drafts.into_iter().map(name).collect()
}

impl Settings {
    /// Who said each of the settings that is said at all.
    fn origins(&self) -> BTreeMap<String, String> {
        fn origin<T>(key: &str, said: &Option<Said<T>>) -> Option<(String, String)> {
            said.as_ref().map(|said| (key.to_owned(), said.place.source()))
        }
        [
            origin("admin.http", &self.admin_http),
            origin("admin.control", &self.control),
            origin("admin.ready_when", &self.ready_when),
            origin("acceleration.tier", &self.tier),
            origin("acceleration.require", &self.require),
            origin("acceleration.cgroup", &self.cgroup),
            origin("acceleration.instance", &self.instance),
            origin("acceleration.stale_after", &self.stale_after),
            origin("acceleration.inflight_bytes", &self.inflight_bytes),
            origin("acceleration.inflight_messages", &self.inflight_messages),
            origin("drain.grace", &self.drain_grace),
            origin("drain.deadline", &self.drain_deadline),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn admin(&self) -> Admin {
        let default = Admin::default();
        Admin {
            http: self.admin_http.as_ref().map_or(default.http, |said| said.value.0),
            control: match &self.control {
                None => default.control,
                Some(said) => said.value.0.clone().map_or(Control::Off, Control::At),
            },
            ready_when: self.ready_when.as_ref().map_or(default.ready_when, |said| said.value),
        }
    }

    fn acceleration(&self) -> Result<Acceleration, ConfigError> {
        let tier = self.tier.as_ref().map_or(TierLimit::Auto, |said| said.value);
        let require = self.require.as_ref().and_then(|said| said.value.0);
        if let (Some(said), Some(required)) = (&self.require, require)
            && !tier.allows(required)
        {
            return Err(Problem::new(
                format!("tier {required} is required, and only {tier} and below is allowed"),
                format!("require {tier} or lower, or allow {required}"),
            )
            .at(&said.place));
        }
        let default = Acceleration::default();
        let cgroup = self.cgroup.as_ref().map_or(default.cgroup, |said| said.value.clone());
        let instance = self.instance.as_ref().map(|said| said.value.0.clone());
        let stale_after =
            self.stale_after.as_ref().map_or(default.stale_after, |said| said.value.0);
        let InFlight { bytes, messages } = default.inflight;
        let inflight = InFlight {
            bytes: self.inflight_bytes.as_ref().map_or(bytes, |said| said.value.0),
            messages: self.inflight_messages.as_ref().map_or(messages, |said| said.value.0),
        };
        Ok(Acceleration { tier, require, cgroup, instance, stale_after, inflight })
    }

    fn drain(&self) -> Result<Drain, ConfigError> {
        let default = Drain::default();
        let drain = Drain {
            grace: self.drain_grace.as_ref().map_or(default.grace, |said| said.value.0),
            deadline: self.drain_deadline.as_ref().map_or(default.deadline, |said| said.value.0),
        };
        if drain.grace > drain.deadline {
            let said = self.drain_grace.as_ref().or(self.drain_deadline.as_ref());
            let place = said.map_or_else(|| Place::named("drain"), |said| said.place.clone());
            return Err(Problem::new(
                format!(
                    "grace {} ends after deadline {}",
                    humantime::format_duration(drain.grace),
                    humantime::format_duration(drain.deadline)
                ),
                "raise the deadline or shorten the grace; both count from the signal",
            )
            .at(&place));
        }
        Ok(drain)
    }
}

impl Draft {
    /// The route this draft describes, under its final name.
    fn route(self, name: &Name, acceleration: &Acceleration) -> Result<Route, ConfigError> {
        let tier = self.policy.tier.and(acceleration.tier);
        if let Some(required) = acceleration.require
            && !tier.allows(required)
        {
            return Err(Problem::new(
                format!("tier {required} is required, and this route allows only {tier}"),
                format!("allow {required} here, or lower acceleration.require"),
            )
            .at(&self.place.key("tier")));
        }
        let upstream = match self.service {
            Service::Shared(upstream) => upstream,
            Service::Own { endpoints, balance } => Arc::new(Upstream {
                name: name.shared(),
                endpoints,
                balance,
                connect: Connect::default(),
                dns: Dns::default(),
                health: None,
                eject: Some(Eject::default()),
                on_unhealthy: OnUnhealthy::default(),
            }),
        };
        Ok(Route {
            name: name.shared(),
            listen: self.listen.into_iter().map(|said| said.value).collect(),
            socket_mode: self.policy.socket_mode,
            upstream,
            max_connections: self.policy.max_connections,
            max_pending: self.policy.max_pending,
            per_endpoint: self.policy.per_endpoint,
            idle_timeout: self.policy.idle_timeout,
            tier,
            clients: self.policy.clients,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Balance, Document, Environment, Tier};

    const FILE: &str = "version: 1
drain: { grace: 1s }
acceleration: { tier: splice }
routes:
  - { listen: 1111, upstream: a }
  - { name: b, listen: 2222, upstream: a, tier: copy }
upstreams: { a: { endpoints: 'a:1', balance: round_robin }, unused: { endpoints: 'x:1' } }
";

    fn file(text: &str) -> Layer {
        Document::new(Path::new("c.yaml"), text.to_owned()).layer(&Environment::default()).unwrap()
    }

    fn variables<const N: usize>(variables: [(&str, &str); N]) -> Layer {
        variables.into_iter().collect::<Environment>().layer().unwrap()
    }

    fn routes<const N: usize>(routes: [&str; N]) -> Layer {
        let numbered = routes.iter().enumerate();
        let numbered = numbered.map(|(n, route)| (format!("AMBASSADOR_ROUTE_{n}"), *route));
        numbered.collect::<Environment>().layer().unwrap()
    }

    fn names(resolved: &Resolved) -> Vec<&str> {
        resolved.config.routes.iter().map(|route| &*route.name).collect()
    }

    fn refusal(layers: Vec<Layer>) -> String {
        resolve(layers).unwrap_err().to_string()
    }

    #[test]
    fn the_higher_source_wins_and_each_value_knows_who_said_it() {
        let higher = variables([("AMBASSADOR_DRAIN_GRACE", "2s"), ("AMBASSADOR_ROUTE_0", "9=z:9")]);
        let Resolved { config, origins, warnings, .. } = resolve(vec![higher, file(FILE)]).unwrap();
        assert_eq!(config.drain.grace.as_secs(), 2);
        assert_eq!(config.drain.deadline.as_secs(), 25);
        assert_eq!(origins["drain.grace"], "AMBASSADOR_DRAIN_GRACE");
        assert_eq!(origins["acceleration.tier"], "c.yaml");
        assert_eq!(origins.get("drain.deadline"), None);
        assert_eq!(origins["routes.z"], "AMBASSADOR_ROUTE_0");
        assert_eq!(origins["routes.b"], "c.yaml");
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].to_string().contains("upstreams.unused: no route leads here"));
    }

    #[test]
    fn of_every_setting_the_higher_source_wins() {
        const NAMES: [&str; 12] = [
            "ADMIN_HTTP",
            "CONTROL",
            "READY_WHEN",
            "TIER",
            "REQUIRE",
            "CGROUP",
            "INSTANCE",
            "STALE_AFTER",
            "INFLIGHT_BYTES",
            "INFLIGHT_MESSAGES",
            "DRAIN_GRACE",
            "DRAIN_DEADLINE",
        ];
        let layer = |values: &str| {
            let values = values.split(' ').map(str::to_owned);
            let settings = NAMES.map(|name| format!("AMBASSADOR_{name}")).into_iter().zip(values);
            let route = [("AMBASSADOR_ROUTE_0".to_owned(), "a:1=x:1".to_owned())];
            settings.chain(route).collect::<Environment>().layer().unwrap()
        };
        let higher = || layer("off unix:/a healthy splice copy /a a 11s 65536 16 1s 2s");
        let lower = layer("0.0.0.0:1 off bound copy none /b b 12s 65537 17 3s 4s");
        let alone = resolve(vec![higher()]).unwrap().config;
        assert_eq!(resolve(vec![higher(), lower]).unwrap().config, alone);
    }

    #[test]
    fn routes_are_united_and_a_name_from_a_higher_source_replaces_the_lower() {
        let resolved = resolve(vec![routes(["b:2222=new:1", "3333=a:1"]), file(FILE)]).unwrap();
        assert_eq!(names(&resolved), ["b", "a-2", "a"]);
        assert_eq!(resolved.config.routes[0].upstream.balance, Balance::Failover);
        assert_eq!(&*resolved.config.routes[1].upstream.name, "a-2");
    }

    #[test]
    fn routes_to_one_upstream_of_the_file_share_it() {
        let resolved = resolve(vec![file(FILE)]).unwrap();
        let [one, other] = &resolved.config.routes[..] else { panic!("two routes") };
        assert!(Arc::ptr_eq(&one.upstream, &other.upstream));
    }

    #[test]
    fn a_route_is_allowed_no_higher_tier_than_the_whole() {
        let tiers = |resolved: Resolved| -> Vec<TierLimit> {
            resolved.config.routes.iter().map(|route| route.tier).collect()
        };
        let at_most = TierLimit::AtMost;
        let resolved = resolve(vec![file(FILE)]).unwrap();
        assert_eq!(tiers(resolved), [at_most(Tier::Splice), at_most(Tier::Copy)]);
        let text = FILE.replace("tier: copy", "tier: direct");
        let resolved = resolve(vec![file(&text)]).unwrap();
        assert_eq!(tiers(resolved), [at_most(Tier::Splice), at_most(Tier::Splice)]);
    }

    #[test]
    fn two_routes_of_one_source_cannot_have_one_name() {
        let error = refusal(vec![routes(["a:1=x:1", "a:2=x:1"])]);
        assert_eq!(
            error,
            "AMBASSADOR_ROUTE_1: the name a is taken by AMBASSADOR_ROUTE_0; give this route another name"
        );
    }

    #[test]
    fn no_route_at_all_is_an_error_with_an_example() {
        assert!(refusal(Vec::new()).contains("--route 5432=orders-db.prod.svc:5432"));
    }

    #[test]
    fn a_requirement_above_what_is_allowed_is_refused() {
        let require = |tier| variables([("AMBASSADOR_REQUIRE", tier)]);
        assert!(refusal(vec![require("direct"), file(FILE)]).contains("only splice and below"));
        assert!(refusal(vec![require("splice"), file(FILE)]).starts_with("c.yaml: routes[1].tier"));
        assert!(resolve(vec![require("copy"), file(FILE)]).is_ok());
    }

    #[test]
    fn a_grace_after_the_deadline_is_refused() {
        let early = variables([("AMBASSADOR_DRAIN_DEADLINE", "500ms")]);
        assert!(refusal(vec![early, file(FILE)]).contains("grace 1s ends after deadline 500ms"));
    }
}

//! Which profile of the upstreams is in force: chosen by evidence, never by accident.
//!
//! Evidence that is absent says nothing. Whatever there is has to name a profile, and the same one: an
//! unknown name or two different ones are an error, or the default with a warning. So nobody reaches `prod`
//! but by evidence that all says so, or by having made it the default.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::Deserialize;

use super::address::EndpointText;
use super::environment::Environment;
use super::evidence::Evidence;
use super::file::within;
use super::layer::Said;
use super::name::Name;
use super::problem::{ConfigError, Place, Problem, Warning, quote};
use super::text::{OneOrMany, Text};
use super::{Endpoint, Profile};

const MAX_ENDPOINTS: usize = 1_000;
const MAX_PROFILES: usize = 100;
const MAX_EVIDENCE: usize = 10;
/// So many profiles are listed in a message.
const MOST_LISTED: usize = 8;

/// Which of the upstreams' profiles is in force.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping with the keys from and default")]
#[schemars(rename = "environment")]
pub(crate) struct EnvironmentText {
    /// What names the profile: env:NAME is a variable's value, file:PATH a file's text, and
    /// namespace-suffix what the Pod's namespace ends in, after a hyphen (by the service account's files, or
    /// by a :PATH of its own). What is absent is passed over; the rest has to agree.
    from: OneOrMany<Text<Evidence>>,
    /// The profile where all of that is absent, and where it is unknown or does not agree, which is an error
    /// without a default. It had better be the one that does no harm.
    default: Option<Text<Name>>,
}

/// Endpoints as they are written.
pub(crate) type EndpointList = OneOrMany<Text<EndpointText>>;

/// Where an upstream is reached.
pub(crate) struct Reached {
    upstream: Place,
    lists: Lists,
}

enum Lists {
    Everywhere(Vec<Endpoint>),
    ByProfile(BTreeMap<Name, Vec<Endpoint>>),
}

/// The profile that is in force, if any of the upstreams has profiles.
pub(crate) fn in_force<'r, R: Iterator<Item = &'r Reached>>(
    text: Said<Option<EnvironmentText>>,
    upstreams: impl Fn() -> R,
    environment: &Environment,
    warnings: &mut Vec<Warning>,
) -> Result<Option<Profile>, ConfigError> {
    let known: BTreeSet<&Name> = upstreams().flat_map(Reached::profiles).collect();
    let first = upstreams().find(|reached| reached.profiles().next().is_some());
    let Some(first) = first else {
        let problem = Problem::new("no upstream has profiles", "give it profiles, or remove this");
        warnings.extend(text.value.map(|_| Warning::new(text.place, problem)));
        return Ok(None);
    };
    let Some(environment_text) = text.value else {
        let fix = "add environment: { from: [env:APP_ENV] }, or where else it can be learnt";
        return Err(Problem::new("nothing says which profile is in force", fix)
            .at(&first.upstream.key("profiles")));
    };
    let (profile, doubt) = environment_text.choose(&known, environment, &text.place)?;
    warnings.extend(doubt);
    warnings.extend(upstreams().filter_map(|reached| reached.lacks(&known)));
    Ok(Some(profile))
}

impl EnvironmentText {
    /// The one of the `known` profiles that is in force, with a warning if that is in doubt.
    fn choose(
        &self,
        known: &BTreeSet<&Name>,
        environment: &Environment,
        place: &Place,
    ) -> Result<(Profile, Option<Warning>), ConfigError> {
        let default = self.default.as_ref().map(|Text(name)| name);
        if let Some(name) = default.filter(|name| !known.contains(name)) {
            let what = format!("no upstream has a profile {}", quote(name.as_str()));
            let fix = format!("write one of {}", list(known));
            return Err(Problem::new(what, fix).at(&place.key("default")));
        }
        let place = place.key("from");
        within(self.from.0.len(), 1, MAX_EVIDENCE, &place)?;
        let chosen = |name: &Name, evidence: String| Profile { name: name.shared(), evidence };
        if environment.is_elsewhere()
            && let Some(name) = default.or(known.first().copied())
        {
            return Ok((chosen(name, "as an example: the evidence is elsewhere".into()), None));
        }

        let (mut said, mut named, mut unknown) = (Vec::new(), BTreeSet::new(), None);
        for Text(evidence) in &self.from.0 {
            let Some(value) = evidence.read(environment, &place)? else { continue };
            said.push(format!("{evidence} is {}", quote(&value)));
            match evidence.profile(&value, known) {
                Some(name) => drop(named.insert(name)),
                None => unknown = unknown.or(said.last().cloned()),
            }
        }
        let doubt = match (unknown, named.len()) {
            (Some(said), _) => Some(format!("{said}, which is none of {}", list(known))),
            (None, 0 | 1) => None,
            (None, _) => Some(format!("{}, which do not agree", said.join(" and "))),
        };
        match (doubt, named.first(), default) {
            (None, Some(name), _) => Ok((chosen(name, said.join(" and ")), None)),
            (None, None, Some(name)) => {
                Ok((chosen(name, format!("by default, without {}", self.all())), None))
            }
            (None, None, None) => Err(Problem::new(
                format!("nothing says which profile is in force: there is no {}", self.all()),
                format!("have it say one of {}, or write a default", list(known)),
            )
            .at(&place)),
            (Some(doubt), _, Some(name)) => {
                let problem = format!("{doubt}, so that the default {name} is in force");
                let warning = Warning::new(place, Problem::new(problem, "correct what it says"));
                Ok((chosen(name, format!("by default, since {doubt}")), Some(warning)))
            }
            (Some(doubt), _, None) => {
                Err(Problem::new(doubt, "correct what it says, or write a default").at(&place))
            }
        }
    }

    /// All evidence that could be there.
    fn all(&self) -> String {
        let all: Vec<_> = self.from.0.iter().map(|Text(evidence)| evidence.to_string()).collect();
        all.join(" or ")
    }
}

impl Reached {
    /// One of the two has to be written.
    pub(crate) fn new(
        endpoints: Option<EndpointList>,
        profiles: Option<BTreeMap<Text<Name>, EndpointList>>,
        upstream: Place,
    ) -> Result<Self, ConfigError> {
        let meaning = |list: EndpointList, place: Place| {
            within(list.0.len(), 1, MAX_ENDPOINTS, &place)?;
            Ok(list.0.iter().map(|Text(endpoint)| endpoint.meaning()).collect())
        };
        let lists = match (endpoints, profiles) {
            (Some(endpoints), None) => {
                Lists::Everywhere(meaning(endpoints, upstream.key("endpoints"))?)
            }
            (None, Some(profiles)) => {
                let place = upstream.key("profiles");
                within(profiles.len(), 1, MAX_PROFILES, &place)?;
                let lists = profiles.into_iter().map(|(Text(name), endpoints)| {
                    let place = place.key(&name);
                    Ok((name, meaning(endpoints, place)?))
                });
                Lists::ByProfile(lists.collect::<Result<_, _>>()?)
            }
            (Some(_), Some(_)) => {
                let what = "there are endpoints and profiles, which are two ways to say the same";
                return Err(Problem::new(what, "keep one").at(&upstream));
            }
            (None, None) => {
                return Err(Problem::new(
                    "the key \"endpoints\" is missing",
                    "add endpoints, or profiles",
                )
                .at(&upstream));
            }
        };
        Ok(Self { upstream, lists })
    }

    pub(crate) fn upstream(&self) -> &Place {
        &self.upstream
    }

    fn profiles(&self) -> impl Iterator<Item = &Name> {
        match &self.lists {
            Lists::Everywhere(_) => None,
            Lists::ByProfile(lists) => Some(lists.keys()),
        }
        .into_iter()
        .flatten()
    }

    /// What is wrong in profiles that are not in force.
    fn lacks(&self, known: &BTreeSet<&Name>) -> Option<Warning> {
        let own: BTreeSet<_> = self.profiles().collect();
        let lacking: BTreeSet<_> = known.difference(&own).copied().collect();
        if own.is_empty() || lacking.is_empty() {
            return None;
        }
        let what = format!("there is no {}, as in other upstreams", list(&lacking));
        let problem = Problem::new(what, "add it, or this file is refused where that is in force");
        Some(Warning::new(self.upstream.key("profiles"), problem))
    }

    /// Those in the profile that is in force.
    pub(crate) fn endpoints(self, profile: Option<&Profile>) -> Result<Vec<Endpoint>, ConfigError> {
        let lists = match self.lists {
            Lists::Everywhere(endpoints) => return Ok(endpoints),
            Lists::ByProfile(lists) => lists,
        };
        let in_force = profile.map_or("", |profile| &*profile.name);
        let own = list(&lists.keys().collect());
        let it = lists.into_iter().find(|(name, _)| name.as_str() == in_force);
        it.map(|(_, endpoints)| endpoints).ok_or_else(|| {
            let what = format!("only {own} is here, and {in_force} is in force");
            Problem::new(what, format!("add {in_force}")).at(&self.upstream.key("profiles"))
        })
    }
}

/// The profiles, if not too many, for people.
fn list(known: &BTreeSet<&Name>) -> String {
    let listed: Vec<_> = known.iter().take(MOST_LISTED).map(|name| name.as_str()).collect();
    let more = if known.len() > MOST_LISTED { "..." } else { "" };
    listed.join(", ") + more
}

#[cfg(test)]
mod tests;

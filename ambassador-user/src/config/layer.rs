//! What one source says: the file, the environment and the flags each become one [`Layer`].

use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use super::acceleration::{InFlightBytes, InFlightMessages, InstanceText, StaleAfterText};
use super::address::{EndpointText, ListenText};
use super::name::Name;
use super::problem::{ConfigError, Place, Problem, Warning};
use super::shorthand::RouteText;
use super::value::{ControlText, HttpText, RequireText, Within};
use super::{
    Balance, Cgroup, Clients, Endpoint, Limits, Listen, Profile, ReadyWhen, TierLimit, Upstream,
};

/// The bounds of `drain.grace` and `drain.deadline`: none to an hour.
pub(crate) type DrainTime = Within<0, 3_600_000>;

/// Everything one source says.
#[derive(Debug, Default)]
pub(crate) struct Layer {
    pub(crate) settings: Settings,
    /// The profile that the upstreams of a file are in.
    pub(crate) profile: Option<Profile>,
    pub(crate) routes: Vec<Draft>,
    /// Where a file lists its routes, also when it lists none.
    pub(crate) routes_at: Option<Place>,
    pub(crate) warnings: Vec<Warning>,
}

/// The settings that every source can give.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    pub(crate) admin_http: Option<Said<HttpText>>,
    pub(crate) control: Option<Said<ControlText>>,
    pub(crate) ready_when: Option<Said<ReadyWhen>>,
    pub(crate) tier: Option<Said<TierLimit>>,
    pub(crate) require: Option<Said<RequireText>>,
    pub(crate) cgroup: Option<Said<Cgroup>>,
    pub(crate) instance: Option<Said<InstanceText>>,
    pub(crate) stale_after: Option<Said<StaleAfterText>>,
    pub(crate) inflight_bytes: Option<Said<InFlightBytes>>,
    pub(crate) inflight_messages: Option<Said<InFlightMessages>>,
    pub(crate) drain_grace: Option<Said<DrainTime>>,
    pub(crate) drain_deadline: Option<Said<DrainTime>>,
}

/// A value and where it was said.
#[derive(Debug, Clone)]
pub(crate) struct Said<T> {
    pub(crate) value: T,
    pub(crate) place: Place,
}

/// A route of one source, before the sources are united.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    pub(crate) place: Place,
    /// `None`: the route is named after its upstream.
    pub(crate) name: Option<Name>,
    /// Each with its place, so that a collision can name both.
    pub(crate) listen: Vec<Said<Listen>>,
    pub(crate) service: Service,
    pub(crate) policy: Policy,
}

/// What a draft leads to.
#[derive(Debug, Clone)]
pub(crate) enum Service {
    /// An upstream of the file, which other routes may lead to as well.
    Shared(Arc<Upstream>),
    /// An upstream of this route alone, which takes the route's name.
    Own { endpoints: Vec<Endpoint>, balance: Balance },
}

/// A route's settings that have defaults.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    pub(crate) socket_mode: u32,
    pub(crate) max_connections: NonZeroU32,
    pub(crate) max_pending: Option<NonZeroU32>,
    pub(crate) per_endpoint: Limits,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) tier: TierLimit,
    pub(crate) clients: Clients,
}

impl Service {
    pub(crate) fn endpoints(&self) -> &[Endpoint] {
        match self {
            Self::Shared(upstream) => &upstream.endpoints,
            Self::Own { endpoints, .. } => endpoints,
        }
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            // Apps in other containers run as other users; the directory is the boundary.
            socket_mode: 0o666,
            max_connections: const { NonZeroU32::new(10_000).unwrap() },
            max_pending: None,
            per_endpoint: Limits::default(),
            idle_timeout: None,
            tier: TierLimit::Auto,
            clients: Clients::Any,
        }
    }
}

impl Draft {
    /// A route written on one line, with every setting at its default.
    pub(crate) fn from_text(text: &RouteText, place: Place) -> Self {
        let endpoints = text.endpoints.iter().map(EndpointText::meaning).collect();
        Self {
            name: text.name.clone(),
            listen: Said::listen(&text.listen, &place),
            service: Service::Own { endpoints, balance: text.balance() },
            policy: Policy::default(),
            place,
        }
    }
}

impl<T: FromStr<Err = Problem>> Said<T> {
    /// The value that `text` at `place` stands for.
    pub(crate) fn parse(text: &str, place: Place) -> Result<Self, ConfigError> {
        match text.parse() {
            Ok(value) => Ok(Self { value, place }),
            Err(problem) => Err(problem.at(&place)),
        }
    }
}

impl Said<Listen> {
    /// The addresses of a LISTEN that was written at `place`.
    pub(crate) fn listen(text: &ListenText, place: &Place) -> Vec<Self> {
        let said = |value| Self { value, place: place.clone() };
        text.meaning().into_iter().map(said).collect()
    }
}

impl Settings {
    /// These settings, and those of `lower` where these are silent.
    pub(crate) fn or(self, lower: Self) -> Self {
        Self {
            admin_http: self.admin_http.or(lower.admin_http),
            control: self.control.or(lower.control),
            ready_when: self.ready_when.or(lower.ready_when),
            tier: self.tier.or(lower.tier),
            require: self.require.or(lower.require),
            cgroup: self.cgroup.or(lower.cgroup),
            instance: self.instance.or(lower.instance),
            stale_after: self.stale_after.or(lower.stale_after),
            inflight_bytes: self.inflight_bytes.or(lower.inflight_bytes),
            inflight_messages: self.inflight_messages.or(lower.inflight_messages),
            drain_grace: self.drain_grace.or(lower.drain_grace),
            drain_deadline: self.drain_deadline.or(lower.drain_deadline),
        }
    }
}

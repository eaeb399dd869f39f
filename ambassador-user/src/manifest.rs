//! `ambassador manifest`: the container beside an app, as a patch of its Deployment. What it prints are the
//! files of `deploy/component/`, with the variables of this configuration in the place of a ConfigMap.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::cli::ConfigArgs;
use crate::config::{Config, Environment, Listen};

/// What the ambassador of a Pod is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// No privilege: tiers splice and copy
    Restricted,
    /// Privileges that it gives up after its start: all tiers
    Accelerated,
    /// An init container with privileges before it: all tiers
    Loader,
}

/// In each of the files: where the variables come from, and the name of what is patched.
const VARIABLES: &str = "envFrom: [{ configMapRef: { name: ambassador } }]";
const NAME: &str = "name: any # the target in kustomization.yaml decides";

impl Mode {
    fn component(self) -> &'static str {
        match self {
            Self::Restricted => include_str!("../../deploy/component/restricted/sidecar.yaml"),
            Self::Accelerated => include_str!("../../deploy/component/accelerated/sidecar.yaml"),
            Self::Loader => include_str!("../../deploy/component/loader/sidecar.yaml"),
        }
    }
}

/// Prints the patch; an error if the configuration would be refused where it is to run.
pub fn print(mode: Mode, deployment: Option<&str>, args: &ConfigArgs) -> Result<()> {
    // What this process's own variables say is not said there.
    let resolved = args.resolve(&Environment::elsewhere())?;
    let mut text = patch(mode.component(), deployment, &variables(args));
    to_do(&resolved.config, args).iter().for_each(|line| text += &format!("# To do: {line}\n"));
    std::io::stdout().write_all(text.as_bytes()).context("print the manifest")
}

fn patch(component: &str, deployment: Option<&str>, variables: &[(String, String)]) -> String {
    let mut text = String::new();
    for line in component.lines() {
        let indent = &line[..line.len() - line.trim_start().len()];
        match (line.trim(), deployment) {
            (VARIABLES, _) => {
                text += &format!("{indent}env:\n");
                for (name, value) in variables {
                    // JSON's quotes are YAML's too.
                    let value = serde_json::Value::from(value.as_str());
                    text += &format!("{indent}  - {{ name: {name}, value: {value} }}\n");
                }
            }
            (NAME, Some(name)) => text += &format!("{indent}name: {name}\n"),
            _ => text += &format!("{line}\n"),
        }
    }
    text
}

/// The variables that say what the flags say.
fn variables(args: &ConfigArgs) -> Vec<(String, String)> {
    let ConfigArgs { config, routes, tier, require, cgroup, instance, .. } = args;
    let ConfigArgs { stale_after, inflight_bytes, inflight_messages, .. } = args;
    let ConfigArgs { admin_http, control, ready_when, drain_grace, drain_deadline, .. } = args;
    let file = config.as_deref().map(|file| format!("/etc/ambassador/{}", file_name(file)));
    let settings = [
        ("CONFIG", &file),
        ("TIER", tier),
        ("REQUIRE", require),
        ("CGROUP", cgroup),
        ("INSTANCE", instance),
        ("STALE_AFTER", stale_after),
        ("INFLIGHT_BYTES", inflight_bytes),
        ("INFLIGHT_MESSAGES", inflight_messages),
        ("ADMIN_HTTP", admin_http),
        ("CONTROL", control),
        ("READY_WHEN", ready_when),
        ("DRAIN_GRACE", drain_grace),
        ("DRAIN_DEADLINE", drain_deadline),
    ];
    let routes = routes.iter().enumerate();
    let routes = routes.map(|(index, route)| (format!("AMBASSADOR_ROUTE_{index}"), route.clone()));
    let settings = settings.into_iter().filter_map(|(name, value)| {
        value.as_ref().map(|value| (format!("AMBASSADOR_{name}"), value.clone()))
    });
    settings.chain(routes).collect()
}

/// What else the Pod needs, which is not for this container alone to say.
fn to_do(config: &Config, args: &ConfigArgs) -> BTreeSet<String> {
    let mut to_do = BTreeSet::new();
    if let Some(file) = &args.config {
        to_do.insert(format!(
            "kubectl create configmap ambassador-config --from-file={}",
            file.display()
        ));
    }
    for listen in config.routes.iter().flat_map(|route| &route.listen) {
        match listen {
            Listen::Tcp { address, .. } if address.port() < 1024 => {
                to_do.insert(format!(
                    "let users other than root listen on port {}: in the Pod's securityContext, sysctls \
                     with net.ipv4.ip_unprivileged_port_start",
                    address.port()
                ));
            }
            Listen::Unix(path) => {
                to_do.insert(format!(
                    "mount an emptyDir at {}, in this container and the app's",
                    path.parent().unwrap_or(path).display()
                ));
            }
            Listen::Tcp { .. } => {}
        }
    }
    to_do
}

fn file_name(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn args(routes: &[&str]) -> ConfigArgs {
        let routes = routes.iter().map(ToString::to_string).collect();
        ConfigArgs { routes, tier: Some("splice".into()), ..ConfigArgs::default() }
    }

    #[test]
    fn every_container_of_every_mode_gets_the_variables() {
        for mode in Mode::value_variants() {
            let variables = variables(&args(&["5432=db:5432", r#"unix:/run/a "b\".sock=c:1"#]));
            let text = patch(mode.component(), Some("orders"), &variables);
            let patch: Value = serde_saphyr::from_str(&text).unwrap();
            assert_eq!(patch["metadata"]["name"], "orders");
            let containers = patch.pointer("/spec/template/spec/initContainers").unwrap();
            let containers = containers.as_array().unwrap();
            assert_eq!(containers.len(), if *mode == Mode::Loader { 2 } else { 1 });
            for container in containers {
                let expected = json!([
                    { "name": "AMBASSADOR_TIER", "value": "splice" },
                    { "name": "AMBASSADOR_ROUTE_0", "value": "5432=db:5432" },
                    { "name": "AMBASSADOR_ROUTE_1", "value": r#"unix:/run/a "b\".sock=c:1"# },
                ]);
                assert_eq!((&container["env"], &container["envFrom"]), (&expected, &Value::Null));
            }
        }
    }

    #[test]
    fn what_the_pod_has_to_give_is_named() {
        let args = args(&["81=a:80", "unix:/run/db/a.sock=b:1", "8080=c:1"]);
        let resolved = args.resolve(&Environment::default()).unwrap();
        let told: Vec<_> = to_do(&resolved.config, &args).into_iter().collect();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(
            told[0].contains("port 81: ") && told[1].contains("emptyDir at /run/db,"),
            "{told:?}"
        );
    }
}

//! A manifest as podman 4 understands it. What it does not know of Kubernetes is said in its own words or left
//! to the test, which then does the kubelet's part; what the ambassador is given stays as it is.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::projected::{self, Files};

/// As Kubernetes has it.
const GRACE: u64 = 30;

/// Where images have the ambassador.
const PROGRAM: &str = "/ambassador";
/// An app that waits until it is told to end.
const APP: &str = "trap 'exit 0' TERM; sleep 1000000 & wait";
/// The volume by which containers are told of a name server, as the kubelet tells them without one.
const RESOLVER: &str = "resolver";

/// What a node has for any Pod.
#[derive(Debug)]
pub(super) struct Node {
    /// The image of the ambassador, and that of any app.
    pub(super) ambassador: String,
    pub(super) app: &'static str,
    pub(super) resolv_conf: PathBuf,
    /// Where volumes that the kubelet makes lie, by their Pods.
    pub(super) volumes: PathBuf,
}

/// Commands, by the containers that run them.
pub(super) type Hooks = Vec<(String, Vec<String>)>;

/// One Pod, with the ConfigMaps and Secrets that it refers to.
#[derive(Debug)]
pub struct Manifest {
    /// The Pod's.
    pub(super) name: String,
    /// What containers run once they are started, and before they are ended.
    pub(super) after_start: Hooks,
    pub(super) before_stop: Hooks,
    /// Settings of its network namespace, by name.
    pub(super) sysctls: Vec<(String, String)>,
    /// Seconds between SIGTERM and SIGKILL.
    pub(super) grace: u64,
    /// Volumes that the kubelet makes: their names, where they lie, and what is in them at first.
    pub(super) projected: Vec<(String, PathBuf, Files)>,
    documents: Vec<Value>,
}

impl Manifest {
    /// Reads documents of YAML: one Pod, or one of the kinds that make Pods, and what it refers to.
    pub(super) fn read(text: &str, node: &Node) -> Result<Self> {
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(text).context("read the manifest")?;
        let is_pod = |it: &Value| !matches!(it["kind"].as_str(), Some("ConfigMap" | "Secret"));
        let (mut pods, mut documents): (Vec<_>, Vec<_>) = documents.into_iter().partition(is_pod);
        let mut document = pods.pop().context("find a Pod in the manifest")?;
        ensure!(pods.is_empty(), "more than one Pod is in the manifest");
        let name = document["metadata"]["name"].as_str().context("find its name")?.to_owned();
        let namespace = &document["metadata"]["namespace"];
        let namespace = namespace.as_str().unwrap_or("default").to_owned();
        if document["kind"] != "Pod" {
            let template = document["spec"]["template"].take();
            document = json!({ "metadata": template["metadata"], "spec": template["spec"] });
            document["metadata"]["name"] = name.clone().into();
        }
        document["apiVersion"] = "v1".into();
        document["kind"] = "Pod".into();
        let spec = &mut document["spec"];
        let grace = spec["terminationGracePeriodSeconds"].as_u64().unwrap_or(GRACE);
        let sysctls = spec["securityContext"]["sysctls"].as_array().into_iter().flatten();
        let sysctls = sysctls
            .filter_map(|it| Some((it["name"].as_str()?.into(), it["value"].as_str()?.into())))
            .collect();
        let (mut after_start, mut before_stop) = (Hooks::new(), Hooks::new());
        let mut seccomp = Vec::new();
        // A native sidecar is an init container that is not waited for.
        let init = list(spec, "initContainers")?;
        let (sidecars, init): (Vec<_>, Vec<_>) =
            init.into_iter().partition(|it| it["restartPolicy"] == "Always");
        let apps = list(spec, "containers")?;
        let containers: Vec<_> = sidecars.into_iter().chain(apps).collect();
        for (key, mut containers) in [("initContainers", init), ("containers", containers)] {
            for container in &mut containers {
                let image = container["image"].as_str().context("find a container's image")?;
                let is_ours = image.contains("/ambassador:");
                let name = container["name"].as_str().context("find its name")?.to_owned();
                let of_container = container.as_object_mut().context("read a container")?;
                let image = if is_ours { &node.ambassador } else { node.app };
                of_container.insert("image".into(), image.into());
                let mounts = of_container.entry("volumeMounts").or_insert_with(|| json!([]));
                let mounts = mounts.as_array_mut().context("read a container's mounts")?;
                mounts.push(
                    json!({ "name": RESOLVER, "mountPath": "/etc/resolv.conf", "readOnly": true }),
                );
                // An app may be started by an ambassador of its own.
                if !is_ours
                    && key == "containers"
                    && of_container.get("command").is_none_or(|it| it[0] != PROGRAM)
                {
                    of_container.insert("command".into(), json!(["/bin/sh", "-c", APP]));
                    of_container.remove("args");
                }
                for unknown in
                    ["ports", "restartPolicy", "startupProbe", "readinessProbe", "livenessProbe"]
                {
                    of_container.remove(unknown);
                }
                if let Some(lifecycle) = of_container.remove("lifecycle") {
                    for (hook, hooks) in
                        [("postStart", &mut after_start), ("preStop", &mut before_stop)]
                    {
                        let words =
                            lifecycle[hook]["exec"]["command"].as_array().into_iter().flatten();
                        let words: Vec<_> =
                            words.filter_map(|word| word.as_str().map(str::to_owned)).collect();
                        hooks.extend((!words.is_empty()).then(|| (name.clone(), words)));
                    }
                }
                let profile = &container["securityContext"]["seccompProfile"];
                match profile["type"].as_str() {
                    Some("Unconfined") => seccomp.push((name, "unconfined".to_owned())),
                    Some("Localhost") => {
                        let file =
                            profile["localhostProfile"].as_str().context("find a profile")?;
                        seccomp.push((name, format!("localhost/{file}")));
                    }
                    _ => {}
                }
            }
            spec[key] = containers.into();
        }
        // podman would start init containers again too; a test starts what it has ended.
        spec["restartPolicy"] = "Never".into();
        let mut volumes = list(spec, "volumes")?;
        let mut projected = Vec::new();
        for volume in &mut volumes {
            if let Some(files) = projected::files(volume, &documents, &namespace)? {
                let of_volume = volume["name"].as_str().context("find a volume's name")?.to_owned();
                let place = node.volumes.join(&name).join(&of_volume);
                *volume = json!({ "name": of_volume, "hostPath": { "path": place } });
                projected.push((of_volume, place, files));
            }
        }
        let resolver = json!({ "path": node.resolv_conf, "type": "File" });
        volumes.push(json!({ "name": RESOLVER, "hostPath": resolver }));
        spec["volumes"] = volumes.into();
        // podman knows that by annotations only, as Kubernetes did before 1.19.
        for (container, profile) in seccomp {
            let key = format!("container.seccomp.security.alpha.kubernetes.io/{container}");
            document["metadata"]["annotations"][key] = profile.into();
        }
        // Else podman removes init containers once they have ended, and what they logged with them.
        document["metadata"]["annotations"]["io.podman.annotations.init.container.type"] =
            "always".into();
        documents.push(document);
        Ok(Self { name, after_start, before_stop, sysctls, grace, projected, documents })
    }

    pub(super) fn for_podman(&self) -> String {
        // JSON is YAML.
        self.documents.iter().map(|document| format!("---\n{document}\n")).collect()
    }
}

fn list(spec: &mut Value, key: &str) -> Result<Vec<Value>> {
    match spec.as_object_mut().and_then(|spec| spec.remove(key)) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => Ok(list),
        Some(other) => anyhow::bail!("{key} is no list: {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sidecar_of_a_deployment_becomes_a_container_and_loses_nothing_that_is_ours() -> Result<()>
    {
        let text = r#"
kind: ConfigMap
metadata: { name: settings }
data: { a.yaml: "b" }
---
kind: Deployment
metadata: { name: orders }
spec:
  template:
    spec:
      terminationGracePeriodSeconds: 5
      initContainers:
        - { name: load, image: "localhost/ambassador:latest", args: [load] }
        - name: ambassador
          image: localhost/ambassador:latest
          restartPolicy: Always
          env: [{ name: A, value: b }]
          lifecycle: { preStop: { exec: { command: [/ambassador, drain] } } }
          securityContext: { runAsUser: 1, seccompProfile: { type: Unconfined } }
      containers: [{ name: app, image: "elsewhere/app:9" }]
      volumes: [{ name: settings-volume, configMap: { name: settings } }]
"#;
        let node = Node {
            ambassador: "ours".into(),
            app: "theirs",
            resolv_conf: "/resolv".into(),
            volumes: "/volumes".into(),
        };
        let manifest = Manifest::read(text, &node)?;
        assert_eq!((manifest.name.as_str(), manifest.grace), ("orders", 5));
        assert_eq!(
            manifest.before_stop,
            [("ambassador".into(), vec!["/ambassador".into(), "drain".into()])]
        );
        let place = PathBuf::from("/volumes/orders/settings-volume");
        let files = Files::from([("a.yaml".into(), "b".into())]);
        assert_eq!(manifest.projected, [("settings-volume".into(), place.clone(), files)]);
        let pod = &manifest.documents[1];
        assert_eq!(pod["spec"]["volumes"][0]["hostPath"]["path"], json!(place));
        let init = &pod["spec"]["initContainers"];
        assert_eq!(init.as_array().map(Vec::len), Some(1));
        assert_eq!((&init[0]["name"], &init[0]["args"]), (&json!("load"), &json!(["load"])));
        let ambassador = &pod["spec"]["containers"][0];
        assert_eq!(ambassador["image"], "ours");
        assert_eq!(ambassador["env"], json!([{ "name": "A", "value": "b" }]));
        assert_eq!(ambassador["securityContext"]["runAsUser"], 1);
        assert_eq!(pod["spec"]["containers"][1]["image"], "theirs");
        let key = "container.seccomp.security.alpha.kubernetes.io/ambassador";
        assert_eq!(pod["metadata"]["annotations"][key], "unconfined");
        Ok(())
    }
}

//! What is in `deploy/`: valid for Kubernetes, within the Pod Security level that it claims, a configuration
//! that the ambassador takes, and the same as `ambassador manifest` prints. Running it is another test's.

mod documents;
mod pod_security;
mod printed;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ::ambassador::cli::Cli;
use ambassador_tests::ambassador;
use ambassador_tests::place::Place;
use ambassador_tests::process::{Finished, Process, run};
use ambassador_tests::server::missing;
use ambassador_tests::wait::SOON;
use ambassador_tests::{installed, skip};
use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde_json::{Value, json};

use documents::{
    MODES, ambassadors, build, containers, examples, of_kind, overlay, pods, root, says, texts,
};
use pod_security::Level::{Baseline, Restricted};
use pod_security::broken;

/// What knows the Kubernetes schemas, and the oldest and newest of them that count here.
const SCHEMAS: &str = "kubernetes-validate";
const VERSIONS: [&str; 2] = ["1.29", "1.34"];

const A_POD: &str = "deploy/examples/redis.yaml";

const INSTALL: Duration = Duration::from_secs(120);
const NOT_A_CONFIGURATION: i32 = 78;

#[test]
fn every_manifest_fits_the_kubernetes_schemas() -> Result<()> {
    let validate = match schemas() {
        Ok(validate) => validate,
        Err(error) => skip!("{SCHEMAS} cannot be installed: {error:#}"),
    };
    let judge = |path: &Path, version: &str| {
        let mut command = Command::new(&validate);
        Process::start(command.args(["--strict", "-k", version]).arg(path))?.finish(INSTALL)
    };
    let scratch = tempfile::tempdir()?;
    let mut paths: Vec<_> = texts()?.into_iter().map(|(path, _)| path).collect();
    // Those are kustomize's, or a part of what it builds.
    paths.retain(|path| !path.ends_with("kustomization.yaml") && !path.ends_with("sidecar.yaml"));
    ensure!(paths.len() >= 10, "{paths:?}");
    for (mode, built) in built(&MODES)? {
        let path = scratch.path().join(format!("{mode}.yaml"));
        fs::write(&path, built)?;
        paths.push(path);
    }
    for path in &paths {
        for version in VERSIONS {
            judge(path, version)?.success()?;
        }
    }
    // What is no manifest does not pass.
    let (path, text) = (scratch.path().join("wrong.yaml"), fs::read_to_string(root().join(A_POD))?);
    for (right, wrong) in [("env:", "enw:"), ("containerPort: 9090", "containerPort: x")] {
        ensure!(text.contains(right), "{A_POD} has no {right}");
        fs::write(&path, text.replace(right, wrong))?;
        ensure!(!judge(&path, VERSIONS[0])?.status.success(), "{wrong} was taken");
    }
    Ok(())
}

#[test]
fn what_claims_restricted_is_restricted() -> Result<()> {
    let mut claims = Vec::new();
    for (path, documents) in examples()? {
        let text = fs::read_to_string(&path)?;
        ensure!(text.contains("# Pod Security: restricted."), "{} claims nothing", path.display());
        claims.extend(pods(&documents).cloned());
    }
    ensure!(claims.len() >= 8, "{} examples", claims.len());
    for (_, built) in built(&["restricted"])? {
        claims.extend(pods(&says(&built)?).cloned());
    }
    for spec in &claims {
        ensure!(broken(spec, Restricted).is_empty(), "{:?}: {spec:#}", broken(spec, Restricted));
    }
    Ok(())
}

#[test]
fn every_rule_of_pod_security_can_be_broken() -> Result<()> {
    let (_, documents) = examples()?.pop().context("find an example")?;
    let good = pods(&documents).next().context("find a Pod")?;
    let first = |path: &str| format!("/containers/0/{path}");
    let worse = [
        ("HostProcess", first("securityContext/windowsOptions"), json!({ "hostProcess": true })),
        ("Host Namespaces", "/hostNetwork".into(), json!(true)),
        ("Host Namespaces", "/hostPID".into(), json!(true)),
        ("Privileged Containers", first("securityContext/privileged"), json!(true)),
        ("Capabilities", first("securityContext/capabilities/add"), json!(["BPF"])),
        (
            "HostPath Volumes",
            "/volumes".into(),
            json!([{ "name": "a", "hostPath": { "path": "/" } }]),
        ),
        ("Host Ports", first("ports"), json!([{ "containerPort": 1, "hostPort": 1 }])),
        (
            "Host Probes / Lifecycle Hooks",
            first("livenessProbe"),
            json!({ "tcpSocket": { "host": "db", "port": 1 } }),
        ),
        ("AppArmor", first("securityContext/appArmorProfile"), json!({ "type": "Unconfined" })),
        ("SELinux", first("securityContext/seLinuxOptions"), json!({ "type": "spc_t" })),
        ("/proc Mount Type", first("securityContext/procMount"), json!("Unmasked")),
        ("Seccomp", first("securityContext/seccompProfile"), json!({ "type": "Unconfined" })),
        ("Sysctls", "/securityContext".into(), json!({ "sysctls": [{ "name": "kernel.msgmax" }] })),
        ("Volume Types", "/volumes".into(), json!([{ "name": "a", "nfs": {} }])),
        ("Privilege Escalation", first("securityContext/allowPrivilegeEscalation"), json!(true)),
        ("Running as Non-root", first("securityContext/runAsNonRoot"), json!(false)),
        ("Running as Non-root user", first("securityContext/runAsUser"), json!(0)),
        ("Seccomp, set", first("securityContext/seccompProfile"), Value::Null),
        ("Capabilities, dropped", first("securityContext/capabilities"), json!({})),
    ];
    for (rule, path, value) in &worse {
        let (parent, name) = path.rsplit_once('/').context("split a path")?;
        let mut bad = good.clone();
        bad.pointer_mut(parent).with_context(|| format!("find {parent}"))?[name] = value.clone();
        ensure!(broken(&bad, Restricted).contains(rule), "{path}: {:?}", broken(&bad, Restricted));
    }
    for rule in pod_security::rules() {
        ensure!(worse.iter().any(|(tried, ..)| *tried == rule), "{rule} was not tried");
    }
    Ok(())
}

#[test]
fn the_kernel_tiers_break_no_more_of_pod_security_than_they_say() -> Result<()> {
    installed!("kubectl");
    for mode in ["accelerated", "loader"] {
        let built = says(&build(&overlay(mode))?)?;
        let mut spec = pods(&built).next().context("find the Pod")?.clone();
        let broken_by = broken(&spec, Baseline);
        ensure!(
            broken_by == ["Capabilities", "HostPath Volumes", "Seccomp"],
            "{mode}: {broken_by:?}"
        );
        for root in ambassadors(&built).filter(|it| it["securityContext"]["runAsUser"] == 0) {
            // Or the kubelet refuses it in a Pod that says otherwise for all.
            ensure!(root["securityContext"]["runAsNonRoot"] == false, "{root:#}");
        }
        // Without what is the ambassador's, nothing is left of that.
        spec["initContainers"] = json!([]);
        spec["volumes"] = json!([]);
        ensure!(broken(&spec, Restricted).is_empty(), "{mode}: {:?}", broken(&spec, Restricted));
    }
    let built = says(&build(&overlay("loader"))?)?;
    let sidecar =
        ambassadors(&built).find(|it| it["name"] == "ambassador").context("find the sidecar")?;
    let alone = json!({ "containers": [sidecar] });
    let broken_by = broken(&alone, Restricted);
    ensure!(broken_by == ["Seccomp", "Seccomp, set"], "the sidecar itself: {broken_by:?}");
    Ok(())
}

#[test]
fn every_configuration_is_one_that_the_ambassador_takes() -> Result<()> {
    let mut all: Vec<Vec<Value>> =
        examples()?.into_iter().map(|(_, documents)| documents).collect();
    for (_, built) in built(&MODES)? {
        all.push(says(&built)?);
    }
    let mut checked = 0;
    for documents in &all {
        for container in ambassadors(documents) {
            let told = check(documents, container, |text| text)?.success()?;
            ensure!(told.contains("\nroute "), "{told}");
            let bad = |text: String| text.replace("listen:", "lisen:") + " ?";
            ensure!(
                check(documents, container, bad)?.code() == Some(NOT_A_CONFIGURATION),
                "{container:#}"
            );
            checked += 1;
        }
    }
    ensure!(checked >= 8, "only {checked}");
    Ok(())
}

/// Has the ambassador check what a container of it is told by these documents.
fn check(
    documents: &[Value],
    container: &Value,
    change: impl Fn(String) -> String,
) -> Result<Finished> {
    let directory = tempfile::tempdir()?;
    let here = directory.path().to_string_lossy().into_owned();
    let at = |text: &Value| {
        let text = text.as_str().context("read a text")?;
        Ok::<_, anyhow::Error>(text.replace("/etc/ambassador", &here))
    };
    let maps = || of_kind(documents, "ConfigMap");
    for (name, text) in maps().filter_map(|map| map["data"].as_object()).flatten() {
        fs::write(directory.path().join(name), change(at(text)?))?;
    }
    let mut words = vec!["check".to_owned()];
    let arguments = container["args"].as_array().into_iter().flatten();
    let arguments: Vec<_> = arguments.map(at).collect::<Result<_>>()?;
    if arguments.first().is_some_and(|word| word == "run") {
        words.extend_from_slice(&arguments[1..]);
    }
    let mut command = ambassador::command(&Place::here())?;
    for variable in container["env"].as_array().into_iter().flatten() {
        let name = variable["name"].as_str().context("read a name")?;
        command.env(name, change(at(&variable["value"])?));
    }
    for source in container["envFrom"].as_array().into_iter().flatten() {
        let map = maps().find(|it| it["metadata"]["name"] == source["configMapRef"]["name"]);
        let map = map.context("find the ConfigMap of the variables")?;
        for (name, value) in map["data"].as_object().into_iter().flatten() {
            command.env(name, at(value)?);
        }
    }
    Process::start(command.args(&words))?.finish(SOON)
}

#[test]
fn every_command_of_a_manifest_can_be_typed() -> Result<()> {
    let mut typed = 0;
    for (path, text) in texts()? {
        for container in containers(&says(&text)?) {
            let hooks = ["lifecycle/postStart", "lifecycle/preStop"];
            let probes = ["startupProbe", "readinessProbe", "livenessProbe"];
            let commands = hooks.iter().chain(&probes).map(|it| format!("/{it}/exec/command"));
            let ours = container["image"]
                .as_str()
                .is_some_and(|it| it.starts_with("localhost/ambassador"));
            for at in commands.chain(["/command".to_owned(), "/args".to_owned()]) {
                let words = container.pointer(&at).and_then(Value::as_array).into_iter().flatten();
                let mut words: Vec<_> = words.filter_map(Value::as_str).collect();
                if at == "/args" && ours && !words.is_empty() {
                    words.insert(0, "/ambassador");
                }
                if words.first() == Some(&"/ambassador") {
                    let parsed = Cli::try_parse_from(&words);
                    ensure!(parsed.is_ok(), "{}: {words:?}: {:?}", path.display(), parsed.err());
                    typed += 1;
                }
            }
        }
    }
    ensure!(typed >= 5, "only {typed}");
    Ok(())
}

#[test]
fn it_asks_for_less_than_the_images_it_replaces() -> Result<()> {
    let number = |value: &Value, unit: &str| {
        let number = value.as_str()?.strip_suffix(unit)?;
        number.parse::<u32>().ok()
    };
    let mut seen = 0;
    for (path, text) in texts()? {
        for container in ambassadors(&says(&text)?) {
            let resources = &container["resources"];
            let cpu =
                number(&resources["requests"]["cpu"], "m").context("read the request of CPU")?;
            let memory =
                number(&resources["requests"]["memory"], "Mi").context("read the request")?;
            let limit = number(&resources["limits"]["memory"], "Mi").context("read the limit")?;
            ensure!(cpu < 50 && memory < 64 && limit < 128, "{}: {resources}", path.display());
            seen += 1;
        }
    }
    ensure!(seen >= 12, "only {seen}");
    Ok(())
}

#[test]
fn the_component_takes_five_lines() -> Result<()> {
    let readme = fs::read_to_string(root().join("deploy/README.md"))?;
    let mut blocks = readme.split("```yaml\n").skip(1).filter_map(|it| it.split("```").next());
    let lines =
        blocks.find(|block| block.contains("components:")).context("find the five lines")?;
    ensure!(lines.lines().count() == 5, "{lines}");
    installed!("kubectl");
    let scratch = tempfile::tempdir()?;
    std::os::unix::fs::symlink(root(), scratch.path().join("ambassador"))?;
    fs::copy(root().join("deploy/base/deployment.yaml"), scratch.path().join("deployment.yaml"))?;
    let whole = format!("resources: [deployment.yaml]\n{lines}");
    fs::write(scratch.path().join("kustomization.yaml"), whole)?;
    let built = says(&build(scratch.path())?)?;
    let spec = pods(&built).next().context("find the Pod")?;
    ensure!(spec["initContainers"][0]["restartPolicy"] == "Always", "{spec:#}");
    ensure!(broken(spec, Restricted).is_empty(), "{:?}", broken(spec, Restricted));
    let told = check(&built, &spec["initContainers"][0], |text| text)?.success()?;
    ensure!(told.contains("\nroute ") && told.contains("5432"), "{told}");
    Ok(())
}

/// What overlays are built into, by their modes; none where they cannot be, which is a part of the test.
fn built(modes: &[&'static str]) -> Result<Vec<(&'static str, String)>> {
    if let Some(program) = missing(&["kubectl"]) {
        skip::in_part(&format!("the overlays: {program} is not installed"));
        return Ok(Vec::new());
    }
    modes.iter().map(|mode| Ok((*mode, build(&overlay(mode))?))).collect()
}

/// The program, in an environment of its own that stays for the next time.
fn schemas() -> Result<PathBuf> {
    if let Some(program) = missing(&["python3"]) {
        anyhow::bail!("{program} is not installed");
    }
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join(SCHEMAS);
    let program = home.join("bin").join(SCHEMAS);
    if !program.exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&home), INSTALL)?;
        let pip = home.join("bin/pip");
        run(Command::new(pip).args(["install", "--quiet", SCHEMAS]), INSTALL)?;
    }
    Ok(program)
}

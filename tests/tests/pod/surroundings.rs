//! Pods that were not given what their mode takes: one line says what is missing and where a manifest gives
//! it. Routes go on in a lower tier, unless one is required: then the container ends with 77.

use ambassador_tests::cgroup::Cgroup;
use ambassador_tests::podman::{Played, Podman};
use ambassador_tests::process::Process;
use ambassador_tests::wait::until_true;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::edit::{changed, container, documents, edited, named, text};
use crate::{AMBASSADOR, APP, LOAD, PORT, Scene, ask, manifest, overlay, podman_and_kubectl};

const FAILED: i32 = 1;
const REQUIRED_TIER_MISSING: i32 = 77;

const CGROUP_LINE: &str =
    "mount hostPath /sys/fs/cgroup read-only at /host/cgroup (volume host-cgroup)";
const BPFFS_LINE: &str =
    "mount hostPath /sys/fs/bpf/ambassador (DirectoryOrCreate) at /host/bpf (volume host-bpf)";

#[test]
fn without_the_host_s_cgroups_it_names_their_mount() -> Result<()> {
    let podman = podman_and_kubectl!();
    let told = format!("the pod's cgroup is not mounted; {CGROUP_LINE}");
    let manifest = edited("accelerated", |pod| lose_mount(pod, AMBASSADOR, "host-cgroup"))?;
    goes_on_below_direct(&podman, &manifest, AMBASSADOR, &told)
}

#[test]
fn another_tree_of_cgroups_is_not_taken_for_the_host_s() -> Result<()> {
    let podman = podman_and_kubectl!();
    let other = Cgroup::new()?;
    let name = other.path().file_name().context("name a cgroup")?.to_string_lossy().into_owned();
    let told = format!(
        "the pod's cgroup is not in the tree at /host/cgroup, which is not the host's from its root on; \
         {CGROUP_LINE}"
    );
    let manifest = edited("accelerated", |pod| {
        lead_to(pod, "host-cgroup", &format!("/sys/fs/cgroup/{name}"))
    })?;
    goes_on_below_direct(&podman, &manifest, AMBASSADOR, &told)
}

#[test]
fn a_missing_capability_is_named() -> Result<()> {
    let podman = podman_and_kubectl!();
    let told =
        "grant CAP_BPF (in a Pod: securityContext with runAsUser: 0 and capabilities.add: [BPF])";
    let manifest = edited("accelerated", |pod| {
        let added = &mut container(pod, AMBASSADOR)?["securityContext"]["capabilities"]["add"];
        *added = json!(["NET_ADMIN", "PERFMON"]);
        Ok(())
    })?;
    goes_on_below_direct(&podman, &manifest, AMBASSADOR, told)
}

#[test]
fn a_seccomp_profile_that_refuses_bpf_is_named() -> Result<()> {
    let podman = podman_and_kubectl!();
    let told = "(in a Pod: securityContext with seccompProfile: { type: Unconfined })";
    let manifest = edited("accelerated", |pod| {
        container(pod, AMBASSADOR)?["securityContext"]["seccompProfile"] =
            json!({ "type": "RuntimeDefault" });
        Ok(())
    })?;
    goes_on_below_direct(&podman, &manifest, AMBASSADOR, told)
}

#[test]
fn a_loader_without_a_bpffs_names_its_mount() -> Result<()> {
    let podman = podman_and_kubectl!();
    let told = format!("cannot load the kernel half: no bpffs is mounted here; {BPFFS_LINE}");
    let manifest = edited("loader", |pod| lose_mount(pod, LOAD, "host-bpf"))?;
    goes_on_below_direct(&podman, &manifest, LOAD, &told)
}

#[test]
fn a_loader_that_may_not_write_to_the_bpffs_says_so() -> Result<()> {
    let podman = podman_and_kubectl!();
    let told =
        "/host/bpf is mounted read-only; mount it without readOnly: true (volumeMount host-bpf)";
    let manifest = edited("loader", |pod| {
        let mounts = &mut container(pod, LOAD)?["volumeMounts"];
        named(mounts, "host-bpf")?["readOnly"] = json!(true);
        Ok(())
    })?;
    goes_on_below_direct(&podman, &manifest, LOAD, told)
}

#[test]
fn a_sidecar_of_another_user_than_it_was_loaded_for_says_so() -> Result<()> {
    let podman = podman_and_kubectl!();
    let told = "belongs to the user that `ambassador load --for` named";
    let manifest = edited("loader", |pod| {
        container(pod, AMBASSADOR)?["securityContext"]["runAsUser"] = json!(65533);
        Ok(())
    })?;
    goes_on_below_direct(&podman, &manifest, AMBASSADOR, told)
}

#[test]
fn without_a_bpffs_the_kernel_half_ends_with_its_process() -> Result<()> {
    let podman = podman_and_kubectl!();
    let plain = tempfile::tempdir()?;
    let plain = plain.path().to_str().context("name a directory")?;
    let manifest = edited("accelerated", |pod| lead_to(pod, "host-bpf", plain))?;
    let scene = Scene::new(&podman, &requiring_direct(&manifest)?)?;
    scene.ask()?;
    scene.carries_by("direct", 0.0)?;
    let told = format!("however that ends: no bpffs is mounted here; {BPFFS_LINE}");
    says_once(&scene.played, AMBASSADOR, &told)?;
    scene.played.kill(AMBASSADOR, "KILL")?;
    scene.played.wait(AMBASSADOR)?;
    ensure!(scene.ask().is_err(), "somebody still leads the app to its database");
    scene.played.delete()
}

#[test]
fn a_config_map_that_vanishes_changes_nothing_and_is_told() -> Result<()> {
    let podman = podman_and_kubectl!();
    let scene = Scene::new(&podman, &overlay("restricted")?)?;
    scene.played.change("ambassador-config", &[])?;
    until_true("word in the status", || {
        let why = &scene.status()?["config"]["refused"]["why"];
        Ok(why
            .as_str()
            .is_some_and(|why| why.contains("/etc/ambassador/config.yaml: cannot be read")))
    })?;
    says_once(&scene.played, AMBASSADOR, "not reloaded, and what ran before runs on: ")?;
    scene.ask()?;
    scene.played.delete()
}

#[test]
fn a_low_port_without_the_right_to_it_names_the_sysctl() -> Result<()> {
    let podman = podman_and_kubectl!();
    let manifest = changed(&manifest("tcp-proxy")?, |pod| {
        pod["securityContext"] = json!({});
        Ok(())
    })?;
    let pod = podman.make(&manifest)?;
    pod.begin()?;
    ensure!(pod.wait(AMBASSADOR)? == FAILED);
    let line =
        "securityContext.sysctls: [{ name: net.ipv4.ip_unprivileged_port_start, value: \"81\" }]";
    says_once(&pod, AMBASSADOR, line)?;
    pod.delete()
}

#[test]
fn an_app_that_has_the_port_is_told_of() -> Result<()> {
    let podman = podman_and_kubectl!();
    let scene = Scene::new(&podman, &overlay("restricted")?)?;
    scene.played.kill(AMBASSADOR, "KILL")?;
    scene.played.wait(AMBASSADOR)?;
    // A proxy of the app's own.
    let route = format!("{PORT}=orders-db-0.prod.svc.cluster.local:{PORT}");
    let proxy =
        ["/ambassador", "run", "--admin-http", "off", "--control", "off", "--route", &route];
    let proxy: Process = scene.played.start(APP, &proxy)?;
    until_true("the app's own proxy", || Ok(ask(&scene.played, APP, PORT).is_ok()))
        .with_context(|| proxy.stderr())?;
    scene.played.restart(AMBASSADOR)?;
    ensure!(scene.played.wait(AMBASSADOR)? == FAILED);
    says_once(
        &scene.played,
        AMBASSADOR,
        "have that container listen elsewhere, or this route (`listen`)",
    )?;
    scene.ask()?;
    scene.played.delete()
}

/// In a Pod of this manifest a container says so, and traffic flows nevertheless; where `direct` is
/// required, it is that container that ends.
fn goes_on_below_direct(podman: &Podman, manifest: &str, by: &str, told: &str) -> Result<()> {
    let scene = Scene::new(podman, manifest)?;
    scene.ask()?;
    scene.carries_by("splice", 0.0)?;
    ensure!(scene.carried_by("direct")? == 0.0, "{}", scene.explained()?);
    says_once(&scene.played, by, told)?;
    if by == AMBASSADOR {
        let explained = scene.explained()?;
        ensure!(explained.contains(told), "{explained}");
    }
    scene.played.delete()?;

    let pod = podman.make(&requiring_direct(manifest)?)?;
    // podman takes the failure of an init container for its own.
    let _ = pod.begin();
    let code = pod.wait(by)?;
    let logs = pod.logs(by)?;
    ensure!(code == REQUIRED_TIER_MISSING, "ended with {code}: {logs}");
    ensure!(logs.contains(told), "{logs}");
    Ok(())
}

fn says_once(pod: &Played<'_>, container: &str, told: &str) -> Result<()> {
    let logs = pod.logs(container)?;
    let lines = logs.lines().filter(|line| line.contains(told)).count();
    ensure!(lines == 1, "{lines} lines say {told:?}: {logs}");
    Ok(())
}

/// The same Pod, which is to be carried by `direct` or not at all.
fn requiring_direct(manifest: &str) -> Result<String> {
    let mut documents = documents(manifest)?;
    let variables = documents.iter_mut().find(|it| it["metadata"]["name"] == "ambassador");
    variables.context("find the variables")?["data"]["AMBASSADOR_REQUIRE"] = json!("direct");
    Ok(text(&documents))
}

fn lose_mount(pod: &mut Value, name: &str, volume: &str) -> Result<()> {
    let mounts = container(pod, name)?["volumeMounts"].as_array_mut().context("find the mounts")?;
    let before = mounts.len();
    mounts.retain(|it| it["name"] != volume);
    ensure!(mounts.len() + 1 == before, "{name} has no mount of {volume}");
    Ok(())
}

/// Has a volume show another directory of the node.
fn lead_to(pod: &mut Value, volume: &str, path: &str) -> Result<()> {
    named(&mut pod["volumes"], volume)?["hostPath"]["path"] = json!(path);
    Ok(())
}

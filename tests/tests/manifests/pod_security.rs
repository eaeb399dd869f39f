//! The Pod Security Standards, rule by rule, as far as they concern Linux:
//! <https://kubernetes.io/docs/concepts/security/pod-security-standards/>.

use serde_json::Value;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Baseline,
    Restricted,
}

/// A rule's name, and what its `Level` forbids.
type Rule = (&'static str, Level, fn(&Pod) -> bool);

const RULES: &[Rule] = &[
    ("HostProcess", Level::Baseline, |it| it.any("windowsOptions", |it| it["hostProcess"] == true)),
    ("Host Namespaces", Level::Baseline, |Pod(pod)| {
        ["hostNetwork", "hostPID", "hostIPC"].iter().any(|name| pod[name] == true)
    }),
    ("Privileged Containers", Level::Baseline, |it| it.any("privileged", |it| it == true)),
    ("Capabilities", Level::Baseline, |it| {
        it.any("capabilities", |it| list(&it["add"]).any(|name| !USUAL.contains(&name)))
    }),
    ("HostPath Volumes", Level::Baseline, |Pod(pod)| {
        array(&pod["volumes"]).any(|volume| !volume["hostPath"].is_null())
    }),
    ("Host Ports", Level::Baseline, |it| {
        it.containers().flat_map(|it| array(&it["ports"])).any(|port| !port["hostPort"].is_null())
    }),
    ("Host Probes / Lifecycle Hooks", Level::Baseline, |it| {
        let hooks = |it: &'_ Value| {
            let probes =
                ["startupProbe", "readinessProbe", "livenessProbe"].map(|name| it[name].clone());
            let ends = ["postStart", "preStop"].map(|name| it["lifecycle"][name].clone());
            probes.into_iter().chain(ends)
        };
        let host =
            |it: Value| ["httpGet", "tcpSocket"].iter().any(|how| !it[how]["host"].is_null());
        it.containers().flat_map(hooks).any(host)
    }),
    ("AppArmor", Level::Baseline, |it| {
        it.any("appArmorProfile", |it| {
            !["RuntimeDefault", "Localhost"].contains(&text(&it["type"]))
        })
    }),
    ("SELinux", Level::Baseline, |it| {
        let types =
            ["", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"];
        it.any("seLinuxOptions", |it| {
            let others = !it["user"].is_null() || !it["role"].is_null();
            others || !types.contains(&text(&it["type"]))
        })
    }),
    ("/proc Mount Type", Level::Baseline, |it| it.any("procMount", |it| it != "Default")),
    ("Seccomp", Level::Baseline, |it| it.any("seccompProfile", |it| !confined(it))),
    ("Sysctls", Level::Baseline, |Pod(pod)| {
        let mut sysctls = array(&pod["securityContext"]["sysctls"]);
        sysctls.any(|it| !SYSCTLS.contains(&text(&it["name"])))
    }),
    ("Volume Types", Level::Restricted, |Pod(pod)| {
        let kinds = |it: &Value| {
            let keys = it.as_object().into_iter().flat_map(|it| it.keys().cloned());
            keys.filter(|key| key != "name").collect::<Vec<_>>()
        };
        array(&pod["volumes"]).flat_map(kinds).any(|kind| !VOLUMES.contains(&kind.as_str()))
    }),
    ("Privilege Escalation", Level::Restricted, |it| {
        it.containers().any(|it| it["securityContext"]["allowPrivilegeEscalation"] != false)
    }),
    ("Running as Non-root", Level::Restricted, |it| it.lacks("runAsNonRoot", |it| it == true)),
    ("Running as Non-root user", Level::Restricted, |it| it.any("runAsUser", |it| it == 0)),
    ("Seccomp, set", Level::Restricted, |it| it.lacks("seccompProfile", confined)),
    ("Capabilities, dropped", Level::Restricted, |it| {
        it.containers().any(|it| {
            let capabilities = &it["securityContext"]["capabilities"];
            !list(&capabilities["drop"]).any(|name| name == "ALL")
                || list(&capabilities["add"]).any(|name| name != "NET_BIND_SERVICE")
        })
    }),
];

const USUAL: &[&str] = &[
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

const SYSCTLS: &[&str] = &[
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
];

const VOLUMES: &[&str] = &[
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
];

/// The rules up to a level that a Pod's `spec` breaks, by name.
pub(crate) fn broken(spec: &Value, level: Level) -> Vec<&'static str> {
    let rules = RULES.iter().filter(|(_, of, _)| *of <= level);
    rules.filter(|(_, _, breaks)| breaks(&Pod(spec))).map(|(name, _, _)| *name).collect()
}

pub(crate) fn rules() -> impl Iterator<Item = &'static str> {
    RULES.iter().map(|(name, _, _)| *name)
}

struct Pod<'p>(&'p Value);

impl<'p> Pod<'p> {
    fn containers(&self) -> impl Iterator<Item = &'p Value> {
        let Self(pod) = *self;
        ["initContainers", "containers", "ephemeralContainers"]
            .into_iter()
            .flat_map(|kind| array(&pod[kind]))
    }

    /// Whether this is said of the Pod or of a container, and so.
    fn any(&self, name: &str, so: impl Fn(&Value) -> bool) -> bool {
        let all = self.containers().chain([self.0]).map(|it| &it["securityContext"][name]);
        all.filter(|said| !said.is_null()).any(so)
    }

    /// Whether there is a container of which this is not said, by itself or else by the Pod.
    fn lacks(&self, name: &str, so: impl Fn(&Value) -> bool) -> bool {
        let of_pod = &self.0["securityContext"][name];
        self.containers().any(|it| match &it["securityContext"][name] {
            Value::Null => !so(of_pod),
            said => !so(said),
        })
    }
}

fn confined(profile: &Value) -> bool {
    ["RuntimeDefault", "Localhost"].contains(&text(&profile["type"]))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn list(value: &Value) -> impl Iterator<Item = &str> {
    array(value).map(text)
}

#!/usr/bin/env python3
"""An OCI runtime for a machine that may not raise limits, and whose cgroups are of both versions.

It takes the limits out of what podman asks for, and the program off the Pod's cgroup that would keep its
containers from every device, and leaves the rest to crun. Limits of memory and CPU it puts in force by the
controllers of version 1, which lie beside it; they hold for what a container is started with.
"""

import json
import os
import subprocess
import sys

CRUN = "/usr/bin/crun"
CGROUPS = "/sys/fs/cgroup"
CONTROLLERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "controllers")
# In the directory of a container.
LIMITS = "limits.json"


def edit(path, change):
    with open(path) as file:
        spec = json.load(file)
    change(spec)
    with open(path, "w") as file:
        json.dump(spec, file)
    return spec


def without_limits(bundle):
    def change(spec):
        spec["process"].pop("rlimits", None)
        with open(os.path.join(bundle, LIMITS), "w") as file:
            json.dump(spec["linux"].pop("resources", {}), file)

    return change


def limit(container):
    state = subprocess.run([CRUN, "state", container], capture_output=True, text=True, check=True)
    state = json.loads(state.stdout)
    with open(os.path.join(state["bundle"], LIMITS)) as file:
        limits = json.load(file)
    memory, cpu = limits.get("memory", {}).get("limit"), limits.get("cpu", {})
    enter("memory", container, state["pid"], {
        "memory.limit_in_bytes": memory,
        # What sockets hold has an account of its own, which is kept where it has a limit.
        "memory.kmem.tcp.limit_in_bytes": memory,
    })
    enter("cpu", container, state["pid"], {
        "cpu.cfs_period_us": cpu.get("period"),
        "cpu.cfs_quota_us": cpu.get("quota"),
    })


def group_of(controller, container):
    return os.path.join(CONTROLLERS, controller, "libpod-" + container)


def enter(controller, container, process, limits):
    if not os.path.isdir(os.path.join(CONTROLLERS, controller)) or not any(limits.values()):
        return
    group = group_of(controller, container)
    os.makedirs(group, exist_ok=True)
    for name, value in [*limits.items(), ("cgroup.procs", process)]:
        if value:
            with open(os.path.join(group, name), "w") as file:
                file.write(str(value))


def leave(container):
    for controller in ("memory", "cpu"):
        if os.path.isdir(group_of(controller, container)):
            os.rmdir(group_of(controller, container))


def allow_devices(group):
    while group not in ("", "/"):
        path = CGROUPS + group
        shown = subprocess.run(["bpftool", "-j", "cgroup", "show", path], capture_output=True, text=True)
        for program in json.loads(shown.stdout.strip() or "[]"):
            if "device" in program["attach_type"]:
                for name in ("device", "cgroup_device"):
                    detach = ["bpftool", "cgroup", "detach", path, name, "id", str(program["id"])]
                    subprocess.run(detach, capture_output=True)
        group = os.path.dirname(group)


arguments = sys.argv[1:]
if "create" in arguments:
    bundle = arguments[arguments.index("--bundle") + 1] if "--bundle" in arguments else "."
    spec = edit(os.path.join(bundle, "config.json"), without_limits(bundle))
    allow_devices(os.path.dirname(spec["linux"].get("cgroupsPath", "")))
if "exec" in arguments and "--process" in arguments:
    edit(arguments[arguments.index("--process") + 1], lambda process: process.pop("rlimits", None))
if "start" in arguments:
    limit(arguments[-1])
if "delete" in arguments:
    deleted = subprocess.run([CRUN, *arguments])
    leave(arguments[-1])
    sys.exit(deleted.returncode)
os.execv(CRUN, [CRUN, *arguments])

#!/usr/bin/env python3
"""An OCI runtime for a machine that may not raise limits, and whose cgroups are of both versions.

It takes the limits out of what podman asks for, and the program off the Pod's cgroup that would keep its
containers from every device, and leaves the rest to crun.
"""

import json
import os
import subprocess
import sys

CGROUPS = "/sys/fs/cgroup"


def edit(path, change):
    with open(path) as file:
        spec = json.load(file)
    change(spec)
    with open(path, "w") as file:
        json.dump(spec, file)
    return spec


def without_limits(spec):
    spec["process"].pop("rlimits", None)
    spec["linux"].pop("resources", None)


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
    spec = edit(os.path.join(bundle, "config.json"), without_limits)
    allow_devices(os.path.dirname(spec["linux"].get("cgroupsPath", "")))
if "exec" in arguments and "--process" in arguments:
    edit(arguments[arguments.index("--process") + 1], lambda process: process.pop("rlimits", None))
os.execv("/usr/bin/crun", ["/usr/bin/crun", *arguments])

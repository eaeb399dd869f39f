# Run by busybox, in a virtual machine or on this one: what the ambassador says here, with privileges
# and without, and what becomes of traffic. The argument is the directory of the programs.
check() {
    echo "@begin $1"
    shift
    "$@" 2>&1 </dev/null
    code=$?
    echo
    echo "@end $code"
}

# Here is no pod whose cgroup could be found: the one that this runs in stands for it.
tree=$(busybox awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
cgroup=$tree$(busybox sed -n 's/^0:://p' /proc/self/cgroup)

check kernel busybox uname -rv
check doctor "$1/ambassador" doctor --json --cgroup "$cgroup"
if [ "$(busybox id -u)" = 0 ]; then
    check unprivileged busybox su -s /bin/sh nobody -c \
        "$1/ambassador doctor --json --cgroup '$cgroup'"
fi
export AMBASSADOR_BIN="$1/ambassador"
AMBASSADOR_SKIPS=$(busybox mktemp)
export AMBASSADOR_SKIPS
# Only the tiers that a kernel has a part in: an emulated machine is slow. With more than one thread,
# the name of a test and its outcome come in one line.
check torture "$1/torture" --test-threads=2 tcp::direct tcp::sockmap tcp::splice auto::any
# Where `auto` takes `sockmap` unasked, these are what no app may notice.
check app "$1/app" --test-threads=2 auto::any auto::turned
check skips busybox cat "$AMBASSADOR_SKIPS"
busybox rm "$AMBASSADOR_SKIPS"

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

check kernel busybox uname -rv
check doctor "$1/ambassador" doctor --json
if [ "$(busybox id -u)" = 0 ]; then
    check unprivileged busybox su -s /bin/sh nobody -c "$1/ambassador doctor --json"
fi
export AMBASSADOR_BIN="$1/ambassador"
check torture "$1/torture" tcp::splice

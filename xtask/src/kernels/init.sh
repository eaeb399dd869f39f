#!/bin/busybox sh
# The first and only program of the virtual machine: makes a system of it, runs the checks, and
# switches it off. The kernel's messages go to the first serial port, results to the second.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tmpfs -o mode=1777 tmpfs /tmp
ip link set lo up
stty -F /dev/ttyS1 raw
{
    sh /checks /bin
    echo "@begin warnings"
    dmesg | grep -E 'WARNING:|BUG:|Oops|Call Trace|refcount_t:|rcu:.*stall'
    echo "@end 0"
} >/dev/ttyS1 2>&1
poweroff -f

#!/bin/sh
# poweroff, halt, reboot, shutdown and systemctl of an emulated machine, told apart by its name.
# They speak to pid 1 as to systemd, with its real-time signals (systemd(1), SIGRTMIN is 34):
# 3 halt, 4 power off, 5 reboot; 13, 14 and 15 the same at once, as with --force.

ask() { # what, number, number when forced
    signal=$2
    [ -z "$force" ] || signal=$3
    kill "-$((34 + signal))" 1 2>/dev/null && exit 0
    echo "Failed to $1 system via logind: Interactive authentication required." >&2
    exit 1
}

name=${0##*/} force='' action=''
for word; do
    case $word in
    -f | -ff | --force) force=yes ;;
    -r | --reboot) action=reboot ;;
    -h | -P | --poweroff) action=poweroff ;;
    -H | --halt) action=halt ;;
    poweroff | halt | reboot) [ "$name" = systemctl ] && action=$word ;;
    is-system-running) echo running; exit 0 ;;
    -* | now | +0) ;;
    *) [ "$name" = systemctl ] && { echo "System has not been booted with systemd as init system (PID 1)." >&2; exit 1; } ;;
    esac
done
case $name in
systemctl | shutdown) : "${action:=poweroff}" ;;
*) action=$name ;;
esac
case $action in
poweroff) ask 'power off' 4 14 ;;
reboot) ask reboot 5 15 ;;
halt) ask halt 3 13 ;;
esac

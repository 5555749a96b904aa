#!/bin/sh
# nvidia-smi of an emulated machine. /run/hardware/gpu says what is built in, and can be changed from outside.

. /run/hardware/gpu # name, memory (MiB), count, driver, uuid, mode
case $mode in
hang) exec sleep 2147483647 ;;
fail)
    echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver." \
        "Make sure that the latest NVIDIA driver is installed and running."
    exit 9
    ;;
lost) echo 'No devices were found'; exit 6 ;;
esac

field() { # name of a field, number of the card
    case $1 in
    index) echo "$2" ;;
    name | gpu_name) echo "$name" ;;
    uuid | gpu_uuid) echo "$uuid$2" ;;
    count) echo "$count" ;;
    driver_version) echo "$driver" ;;
    memory.total) echo "$memory$mib" ;;
    memory.free) echo "$((memory - 1))$mib" ;;
    memory.used) echo "1$mib" ;;
    utilization.gpu | utilization.memory) echo "0$percent" ;;
    *) echo "Field \"$1\" is not a valid field to query." && return 2 ;;
    esac
}

fields='' list='' header=yes mib=' MiB' percent=' %'
for word; do
    case $word in
    -L | --list-gpus) list=yes ;;
    --query-gpu=*) fields=${word#*=} ;;
    --format=*)
        case $word in *noheader*) header='' ;; esac
        case $word in *nounits*) mib='' percent='' ;; esac
        ;;
    *) echo "Invalid combination of input arguments. Please run 'nvidia-smi -h' for help." && exit 2 ;;
    esac
done

[ -z "$fields" ] || [ -z "$header" ] || echo "$fields" | sed 's/,/, /g'
[ -n "$fields$list" ] || printf '%s\n%s\n%s\n' \
    "+-----------------------------------------------------------------------------------------+" \
    "| NVIDIA-SMI $driver            Driver Version: $driver        CUDA Version: 13.0     |" \
    "|-----------------------------------------+------------------------+----------------------+"
card=0
while [ "$card" -lt "$count" ]; do
    if [ -n "$list" ]; then
        echo "GPU $card: $name (UUID: $uuid$card)"
    elif [ -n "$fields" ]; then
        line=''
        for each in $(echo "$fields" | tr , ' '); do
            value=$(field "$each" "$card") || { echo "$value"; exit 2; }
            line="$line${line:+, }$value"
        done
        echo "$line"
    else
        printf '|   %d  %-32s  | %6dMiB / %6dMiB    |      0%%      Default |\n' "$card" "$name" 1 "$memory"
    fi
    card=$((card + 1))
done

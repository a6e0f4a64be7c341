#!/bin/sh
# Tells Spark the GPUs of this machine: {"name": "gpu", "addresses": ["0", "1"]}
# Where one is divided (MIG), the parts have no numbers: then all are told by their UUIDs.
nvidia-smi -L | awk '
    { uuid = $0; sub(/.*UUID: /, "", uuid); sub(/\).*/, "", uuid) }
    /^GPU/ { whole[++count] = uuid; number[count] = $2 + 0 }
    /^ *MIG/ { parts[count] = parts[count] (parts[count] ? "\", \"" : "") uuid; divided = 1 }
    END {
        for (i = 1; i <= count; i++) {
            address = divided ? (parts[i] ? parts[i] : whole[i]) : number[i]
            list = list (list ? ", " : "") "\"" address "\""
        }
        printf "{\"name\": \"gpu\", \"addresses\": [%s]}\n", list
    }'

#!/usr/bin/env bash
# Runs what `cargo xtask gpu-bundle` packed, on a machine with a Python whose torch is one of the versions it was built
# for; cargo is not needed. Prints a table; what each part said is in OUT. Without a GPU the parts that take none are
# run, and of the others it says why they were not.
#
#   ./run.sh            with `python3`
#   ./run.sh checks-1 timing    only the parts whose names begin so
#   PYTHON=… OUT=… NCCL=/path/to/libnccl.so.2 ./run.sh
#
# NCCL names an NCCL of 2.30 or newer: with it, 2 and 4 ranks share one GPU (for correctness only).
# Ends with 0 when all parts that were asked for are good, 1 when one failed, 2 when no part has such a name, 3 when
# nothing could be run, or there is no GPU and a part that takes one was left out. Parts of 2 and 4 ranks that are left
# out for want of an NCCL do not count. No part takes longer than ten minutes.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
out=${OUT:-$here/out}
asked=("$@")

nothing() { echo "nothing was run: $1" >&2; exit 3; }
torch=$("$python" -c 'import os, torch; print(torch.__version__.split("+")[0], os.path.dirname(torch.__file__))') \
    || nothing "$python has no torch that works; PYTHON=… names another Python"
read -r version torch <<<"$torch"
bin=$here/libtorch-$version
[ -d "$bin" ] || nothing "no programs were packed for torch $version; there is: $(cd "$here" && echo libtorch-*)"
[ -e "$torch/lib/libtorch_cuda.so" ] || nothing "the torch of $python has no CUDA part, which these programs are linked with"
mkdir -p "$out" || nothing "OUT=… names a folder that can be written to"
# Logs of parts that are not run now stay, but not those of another torch.
[ "$(cat "$out/torch" 2>/dev/null)" = "$version" ] || rm -f "$out"/*.log
echo "$version" >"$out/torch"
export LD_LIBRARY_PATH=$torch/lib GPU_TRACES=$out RUST_BACKTRACE=0
for program in "$bin"/*; do
    lacks=$(LC_ALL=C ldd "$program" 2>/dev/null | grep 'not found') && nothing "$(basename "$program") does not load: $lacks"
done
# Parts have limits of their own, below.
export TCH_DISTRIBUTED_TEST_TIMEOUT=3600

no_gpu=
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || no_gpu="torch finds no CUDA device"

failed=0 ran=0 left_out=0
wanted() { # NAME
    local start
    [ ${#asked[@]} = 0 ] && return
    for start in "${asked[@]}"; do [[ $1 == "$start"* ]] && return; done
    return 1
}
part() { # NAME SECONDS COMMAND…
    local name=$1 seconds=$2 start=$SECONDS code; shift 2
    wanted "$name" || return 0
    ran=$((ran + 1))
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1; code=$?
    case $code in
        0) result=ok ;;
        124) result="FAILED (not done after $seconds s)" ;;
        *) result="FAILED (exit status $code)" ;;
    esac
    [ $code = 0 ] || failed=1
    printf '%-34s %-36s %4d s\n' "$name" "$result" $((SECONDS - start))
}
not_run() { # NAME WHY
    wanted "$1" || return 0
    left_out=$((left_out + 1))
    rm -f "$out/$1.log"
    printf '%-34s not run: %s\n' "$1" "$2"
}
gpu_part() { # as part, with a GPU
    [ -z "$no_gpu" ] || { not_run "$1" "$no_gpu"; return; }
    part "$@"
}
suite() { # RANKS
    local test=whole::the_product_as_a_table
    env TCHD_CONFORMANCE_BACKEND=nccl-staged TCHD_CONFORMANCE_WORLD="$1" TCHD_CONFORMANCE_RANKS=processes \
        "$bin/conformance" --exact --nocapture $test
}
cases() { # one rank: the named cases and the random programs
    env RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 TCHD_CONFORMANCE_BACKEND=nccl-staged TCHD_CONFORMANCE_RANKS=launched \
        "$bin/conformance" --exact --nocapture whole::the_product_as_a_table
}
world() { # LANGUAGES: one rank of Rust (r) or PyTorch (p) for each letter
    local rank members=() failed=0
    export WORLD_SIZE=${#1} MASTER_ADDR=127.0.0.1 MASTER_PORT
    MASTER_PORT=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    for ((rank = 0; rank < WORLD_SIZE; rank++)); do
        local member=("$bin/interop")
        [ "${1:rank:1}" = r ] || member=("$python" "$here/rank.py")
        RANK=$rank LOCAL_RANK=$rank "${member[@]}" env nccl &
        members+=($!)
    done
    for rank in "${members[@]}"; do wait "$rank" || failed=1; done
    return $failed
}
export bin python here; export -f suite cases world

"$python" - <<'MACHINE'
import torch
gpus = torch.cuda.device_count()
of = f"{torch.cuda.get_device_name(0)} x {gpus}, NCCL {torch.cuda.nccl.version()}" if gpus else "no GPU"
print(f"torch {torch.__version__}; {of}")
MACHINE
for backend in native gloo; do
    part "suite-$backend-cpu" 540 "$bin/conformance" "$backend::"
done
gpu_part checks-1-rank 540 "$bin/gpu" checks 1
gpu_part product-1-rank 540 bash -c 'suite 1'
gpu_part cases-1-rank 540 bash -c cases
for ranks in 2 4; do
    if [ -n "${NCCL:-}" ]; then
        shared=(env "LD_PRELOAD=$NCCL" NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=4)
        gpu_part "checks-$ranks-ranks-one-gpu" 540 "${shared[@]}" "$bin/gpu" checks $ranks
        gpu_part "product-$ranks-ranks-one-gpu" 540 "${shared[@]}" bash -c "suite $ranks"
        languages=pr; [ $ranks = 2 ] || languages=rppr
        gpu_part "pytorch-$ranks-ranks-one-gpu" 540 "${shared[@]}" bash -c "world $languages"
    else
        for name in checks product pytorch; do
            not_run "$name-$ranks-ranks-one-gpu" "NCCL names no library of 2.30 or newer"
        done
    fi
done
gpu_part timing-ours 540 "$bin/gpu" timing
gpu_part timing-pytorch 540 "$python" "$here/beside.py"
[ $((ran + left_out)) != 0 ] || { echo "no part has a name that begins with ${asked[*]}" >&2; exit 2; }
echo "what they said, and what parts that were not run now said before, is in $out"

grep -hs '^ok\|^FAILED' "$out"/checks-*.log
[ -s "$out/timing-ours.log" ] && [ -s "$out/timing-pytorch.log" ] && "$python" - "$out" <<'TABLE'
import json, sys
def read(name):
    lines = open(f"{sys.argv[1]}/{name}.log").read().splitlines()
    return {row["what"]: row["us"] for row in map(json.loads, (l for l in lines if l.startswith('{"what"')))}
ours, theirs = read("timing-ours"), read("timing-pytorch")
print(f"{'microseconds, median':<44}{'ours':>12}{'PyTorch':>12}{'ratio':>8}")
for what in ours:
    them = theirs.get(what)
    ratio = f"{ours[what] / them:8.2f}" if them else "       ?"
    print(f"{what:<44}{ours[what]:12.1f}{them or float('nan'):12.1f}{ratio}")
TABLE
[ $failed = 0 ] || exit 1
[ -z "$no_gpu" ] || [ $left_out = 0 ] || exit 3
exit 0

#!/usr/bin/env bash
# Runs what `cargo xtask gpu-bundle` packed, on a machine with a GPU and a Python whose torch is one of the versions it
# was built for; cargo is not needed. Prints a table; what each part said is in OUT.
#
#   ./run.sh            with `python3`
#   PYTHON=… OUT=… NCCL=/path/to/libnccl.so.2 ./run.sh
#
# NCCL names an NCCL of 2.30 or newer: with it, 2 and 4 ranks share one GPU (for correctness only).
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
out=${OUT:-$here/out}
mkdir -p "$out"

version=$("$python" -c 'import torch; print(torch.__version__.split("+")[0])') || { echo "no torch in $python"; exit 3; }
torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
bin=$here/libtorch-$version
[ -d "$bin" ] || { echo "nothing was packed for torch $version; there is: $(ls "$here" | grep libtorch-)"; exit 3; }
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch sees no CUDA device: nothing was run"; exit 3; }
export LD_LIBRARY_PATH=$torch/lib GPU_TRACES=$out RUST_BACKTRACE=0
chmod +x "$bin"/*

failed=0
part() { # NAME SECONDS COMMAND…
    local name=$1 seconds=$2 start=$SECONDS code; shift 2
    timeout "$seconds" "$@" >"$out/$name.log" 2>&1; code=$?
    case $code in
        0) result=ok ;;
        124) result="FAILED (not done after $seconds s)" ;;
        *) result="FAILED (exit status $code)" ;;
    esac
    [ $code = 0 ] || failed=1
    printf '%-34s %-36s %4d s\n' "$name" "$result" $((SECONDS - start))
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
export bin; export -f suite cases

echo "torch $version; $("$python" -c 'import torch; print(torch.cuda.get_device_name(0), "x", torch.cuda.device_count(), "NCCL", torch.cuda.nccl.version())')"
part checks-1-rank 600 "$bin/gpu" checks 1
part product-1-rank 900 bash -c 'suite 1'
part cases-1-rank 600 bash -c cases
if [ -n "${NCCL:-}" ]; then
    shared=(env "LD_PRELOAD=$NCCL" NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=4)
    for ranks in 2 4; do
        part "checks-$ranks-ranks-one-gpu" 900 "${shared[@]}" "$bin/gpu" checks $ranks
        part "product-$ranks-ranks-one-gpu" 1800 "${shared[@]}" bash -c "suite $ranks"
    done
else
    echo "2 and 4 ranks on one GPU: not run, NCCL names no library of 2.30 or newer"
fi
part timing-ours 900 "$bin/gpu" timing
part timing-pytorch 900 "$python" "$here/beside.py"

echo
grep -h '^ok\|^FAILED' "$out"/checks-*.log
echo
"$python" - "$out" <<'TABLE'
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
exit $failed

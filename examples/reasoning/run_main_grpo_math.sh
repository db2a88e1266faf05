#!/usr/bin/env bash
# Trains a model with GRPO on math problems.
#
#     bash examples/reasoning/run_main_grpo_math.sh [CONFIG] [key=value ...]
#     bash examples/reasoning/run_main_grpo_math.sh [CONFIG] --check [key=value ...]     # says what is wrong, starts nothing
#
# CONFIG names a file of configs/reasoning, with or without folder and .yaml; without it a tiny model learns additions on the CPU.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
default=arithmetic-grpo-megatron
config=$default
case ${1:-} in
    "" | *=* | --*) ;;
    *) config=$1 && shift ;;
esac
# The path of such a file names it too.
config=${config#"$repository"/} config=${config#./} config=${config#configs/reasoning/} config=${config%.yaml}
if [ "$config" = "$default" ]; then
    echo "Running $default, the tiny CPU default. Others:"
    echo "bash examples/reasoning/run_main_grpo_math.sh CONFIG [key=value ...], CONFIG:"
    for file in "$repository"/configs/reasoning/*.yaml; do echo "    $(basename "$file" .yaml)"; done
fi
if [ ! -f "$repository/configs/reasoning/$config.yaml" ]; then
    echo "error: no config named $config in configs/reasoning" >&2
    exit 2
fi

cd "$repository"
# shellcheck source=scripts/bootstrap.sh
source scripts/bootstrap.sh
export CUDA_DEVICE_MAX_CONNECTIONS=1 TOKENIZERS_PARALLELISM=false RAY_DEDUP_LOGS=0
exec python examples/reasoning/main_grpo.py --config-path "$repository/configs/reasoning" --config-name "$config" "$@"

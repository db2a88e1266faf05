#!/usr/bin/env bash
# Trains a model with GRPO on math problems.
#
#     bash examples/reasoning/run_main_grpo_math.sh [CONFIG] [key=value ...]
#     bash examples/reasoning/run_main_grpo_math.sh [CONFIG] --check [key=value ...]     # says what is wrong, starts nothing
#
# CONFIG names a file of configs/reasoning, with or without folder and .yaml, or is the path of a yaml file anywhere; without it
# a tiny model learns additions on the CPU.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
launch examples/reasoning/run_main_grpo_math.sh configs/reasoning arithmetic-grpo-megatron examples/reasoning/main_grpo.py "$@"

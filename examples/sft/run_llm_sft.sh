#!/usr/bin/env bash
# Supervised fine-tuning of a language model, also on plain text.
#
#     bash examples/sft/run_llm_sft.sh [CONFIG] [key=value ...]
#     bash examples/sft/run_llm_sft.sh [CONFIG] --check [key=value ...]     # says what is wrong, starts nothing
#
# CONFIG names a file of configs/sft, with or without folder and .yaml, or is the path of a yaml file anywhere; without it
# a tiny model is taught additions on the CPU.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch.sh"
launch examples/sft/run_llm_sft.sh configs/sft arithmetic_sft_llm examples/sft/main_sft.py "$@"

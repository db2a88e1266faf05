#!/usr/bin/env bash
# Six ways to start a pretraining on plain text: a menu in a terminal, or flags, which go together.
#
#     bash examples/recipes/run.sh                                # the menu, as with --menu; without a terminal the first way
#     bash examples/recipes/run.sh --plain [CONFIG]               # 1. from one configuration that says everything
#     bash examples/recipes/run.sh --recipe NAME                  # 2. by the name of a model, from random weights
#     bash examples/recipes/run.sh --recipe NAME --hf FOLDER      # 3. from Hugging Face weights
#     bash examples/recipes/run.sh --recipe NAME --tp 4 --pp 2    # 4. own parallel layout: --tp --pp --vpp --cp --ep --etp --devices 0-7
#     bash examples/recipes/run.sh --recipe NAME --precision fp16 # 5. mixed precision: bf16 (default of recipes), fp16; or fp32
#     bash examples/recipes/run.sh --to-hf CHECKPOINT FOLDER      # 6. a checkpoint, global_step_N, to Hugging Face files
#
# Options of rlsync convert may follow 6: --model FOLDER where the checkpoint lacks config.json, --dtype, --test-precision.
# More flags: --data PATH and --tokenizer FOLDER for 1 to 5; --twin runs the recipe's architecture with tiny sizes on the CPU;
# --check says what is wrong and what it takes, and starts nothing; --print shows the command alone. Keys follow as key=value.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=scripts/launch.sh
source "$ROOT/scripts/launch.sh"
CONFIGS=configs/sft
PLAIN=arithmetic_pretrain_text

list_recipes() {
    local file
    for file in "$ROOT/$CONFIGS"/recipe/*.yaml; do printf '    %-18s%s\n' "$(basename "$file" .yaml)" "$(sed -n '2s/^# //p' "$file")"; done
}

usage() {
    sed -n '2,/^set /{/^set /!s/^#\( \|$\)//p}' "${BASH_SOURCE[0]}"
    echo "NAME:"
    list_recipes
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# A path as hydra takes it for a value: quoted where it has spaces, brackets or the like.
as_value() {
    case $1 in
        *[!A-Za-z0-9_./,~-]*) printf '"%s"' "${1//\"/\\\"}" ;;
        *) printf '%s' "$1" ;;
    esac
}

# A command as a shell takes it.
show() {
    local word words=()
    for word; do
        case $word in
            *[[:space:]\(\)\'\$\&\;\*\?\|\<\>\\\`\#\!]*) words+=("$(printf '%q' "$word")") ;;
            *) words+=("$word") ;;
        esac
    done
    echo "${words[*]}"
}

# The answer to a question in `answer`; a default where there is one.
ask() {
    read -rp "$1${2:+ [$2]}: " answer || fail "no answer to: $1"
    answer=${answer:-${2:-}}
    [ -n "$answer" ] || fail "no answer to: $1"
}

menu() {
    local choice answer
    echo "1) plain configuration   2) recipe   3) recipe, from Hugging Face weights"
    echo "4) recipe, own layout    5) recipe, own precision   6) checkpoint to Hugging Face files"
    ask "Which" 1
    choice=$answer
    case $choice in
        1) ask "Configuration of $CONFIGS" "$PLAIN" && chosen=(--plain "$answer") ;;
        [2-5])
            list_recipes
            ask "Recipe" llama3_8b && chosen=(--recipe "$answer")
            case $choice in
                3) ask "Hugging Face folder" && chosen+=(--hf "$answer") ;;
                4)
                    ask "Tensor-parallel size" 1 && chosen+=(--tp "$answer")
                    ask "Pipeline-parallel size" 1 && chosen+=(--pp "$answer")
                    ask "Expert-parallel size" 1 && chosen+=(--ep "$answer")
                    ask "Devices" 0-7 && chosen+=(--devices "$answer")
                    ;;
                5) ask "Precision: bf16, fp16 or fp32" bf16 && chosen+=(--precision "$answer") ;;
            esac
            ask "Text: a JSONL file or a folder; twin: tiny sizes, and text made here" twin
            if [ "$answer" = twin ]; then chosen+=(--twin); else chosen+=(--data "$answer"); fi
            ;;
        6)
            ask "Checkpoint, global_step_N" && chosen=(--to-hf "$answer")
            ask "Folder to write" && chosen+=("$answer")
            ;;
        *) fail "$choice is none of 1 to 6" ;;
    esac
}

chosen=()
if [ "${1:-}" = --menu ]; then
    shift && menu
elif [ $# -eq 0 ] && [ -t 0 ]; then
    menu
fi
set -- ${chosen[@]+"${chosen[@]}"} "$@"

config=$PLAIN plain="" recipe="" twin="" only_print="" keys=() rest=() to_hf=()
while [ $# -gt 0 ]; do
    flag=$1
    case $flag in
        --plain) plain=1 && case ${2:-} in "" | *=* | --*) shift ;; *) config=$2 && shift 2 ;; esac && continue ;;
        --twin) twin=1 && shift && continue ;;
        --print) only_print=1 && shift && continue ;;
        -h | --help) usage && exit 0 ;;
        --check | *=*) rest+=("$flag") && shift && continue ;;
    esac
    [ $# -ge 2 ] || fail "$flag: no flag that is known, or its value is missing; --help lists them"
    value=$2
    shift 2
    case $flag in
        --recipe)
            [ -f "$ROOT/$CONFIGS/recipe/$value.yaml" ] || fail "no recipe $value; there are
$(list_recipes)"
            recipe=$value
            ;;
        --hf) keys+=("actor.megatron.convert_from_hf=True" "actor.model.model_path=$(as_value "$value")") ;;
        --data) keys+=("data.train_data_paths=[$(as_value "$value")]") ;;
        --tokenizer) keys+=("seeded_model.tokenizer=$(as_value "$value")") ;;
        --tp)
            keys+=("actor.model.tensor_model_parallel_size=$value")
            # Activations between its regions are cut too, which experts ask for.
            if [ "$value" = 1 ]; then keys+=("actor.model.sequence_parallel=False"); else keys+=("actor.model.sequence_parallel=True"); fi
            ;;
        --pp) keys+=("actor.model.pipeline_model_parallel_size=$value"
            "actor.model.decoder_first_pipeline_num_layers=null" "actor.model.decoder_last_pipeline_num_layers=null") ;;
        --vpp) keys+=("actor.model.virtual_pipeline_model_parallel_size=$value") ;;
        --cp) keys+=("actor.model.context_parallel_size=$value") ;;
        --ep) keys+=("actor.model.expert_model_parallel_size=$value") ;;
        --etp) keys+=("actor.model.expert_tensor_parallel_size=$value") ;;
        --devices) keys+=("cluster.component_placement.actor=\"$value\"") ;;
        --precision) keys+=("actor.model.precision=$value") ;;
        --to-hf)
            [ $# -ge 1 ] || fail "--to-hf CHECKPOINT FOLDER: the folder to write is missing"
            to_hf=(rlsync convert "$value" "$1" --to hf)
            shift
            for option; do
                if [ "$option" = --print ]; then only_print=1; else to_hf+=("$option"); fi
            done
            set --
            ;;
        *) fail "$flag is no flag; --help lists them" ;;
    esac
done
if [ ${#to_hf[@]} -gt 0 ]; then
    [ -z "$plain$recipe$twin" ] && [ $((${#keys[@]} + ${#rest[@]})) -eq 0 ] || fail "--to-hf stands alone: it starts no run"
    [ -z "$only_print" ] || { show "${to_hf[@]}" && exit 0; }
    # shellcheck source=scripts/bootstrap.sh
    source "$ROOT/scripts/bootstrap.sh"
    exec "${to_hf[@]}"
fi
if [ -n "$recipe" ]; then
    [ -z "$plain" ] || fail "--plain is of a configuration that says everything, and --recipe of another: leave one of them out"
    config=pretrain_text keys=("recipe=$recipe" ${twin:+"+twin=cpu"} ${keys[@]+"${keys[@]}"})
elif [ -n "$twin" ]; then
    fail "--twin is of a recipe: --recipe NAME --twin"
fi
set -- "$config" ${keys[@]+"${keys[@]}"} ${rest[@]+"${rest[@]}"}
[ -z "$only_print" ] || { show bash examples/sft/run_llm_sft.sh "$@" && exit 0; }
launch examples/recipes/run.sh "$CONFIGS" "$PLAIN" examples/sft/main_sft.py "$@"

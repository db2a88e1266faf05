# Starts a run; sourced by the scripts of examples/.
#
#     launch SCRIPT CONFIGS DEFAULT MAIN [CONFIG] [--check] [key=value ...]
#
# SCRIPT is the one that users call and CONFIGS the folder of its configurations, of which DEFAULT needs nothing; MAIN is the entry point.
# All are paths in the repository. CONFIG is a file of CONFIGS, with or without folder and .yaml, or the path of a yaml file anywhere.
# --help says so.
list_configs() {
    local file
    for file in "$1"/*.yaml; do echo "    $(basename "$file" .yaml)"; done
}

launch() {
    local script=$1 configs=$2 default=$3 main=$4
    shift 4
    local repository config=$default folder
    repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    case ${1:-} in
        -h | --help)
            sed -n '2,/^set /{/^set /!s/^#\( \|$\)//p}' "$repository/$script"
            echo "CONFIG:"
            list_configs "$repository/$configs"
            echo "Keys: docs/configuration.md"
            exit 0
            ;;
        "" | *=* | --*) ;;
        *) config=$1 && shift ;;
    esac
    # A file elsewhere is a configuration too; what its defaults name is in CONFIGS.
    folder=$repository/$configs
    if [[ $config = *.yaml && -f $config && ! $config -ef $folder/$(basename "$config") ]]; then
        folder=$(cd "$(dirname "$config")" && pwd) config=$(basename "$config")
        set -- "hydra.searchpath=[\"file://$repository/$configs\"]" "$@"
    fi
    # The path of one in CONFIGS names it, as its name does.
    config=${config#"$repository"/} config=${config#./} config=${config#"$configs"/} config=${config%.yaml}
    if [ "$folder/$config" = "$repository/$configs/$default" ]; then
        echo "Running $default, the tiny CPU default. Others:"
        echo "bash $script CONFIG [key=value ...], CONFIG:"
        list_configs "$repository/$configs"
    fi
    if [ ! -f "$folder/$config.yaml" ]; then
        echo "error: no config named $config in $configs, and no file $config.yaml; bash $script --help lists those there are" >&2
        exit 2
    fi
    cd "$repository"
    # shellcheck source=scripts/bootstrap.sh
    source scripts/bootstrap.sh
    export CUDA_DEVICE_MAX_CONNECTIONS=1 TOKENIZERS_PARALLELISM=false RAY_DEDUP_LOGS=0
    exec python "$main" --config-path "$folder" --config-name "$config" "$@"
}

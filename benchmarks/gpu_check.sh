#!/bin/sh
# Checks a bare machine with one GPU in under eight minutes. What is too large to carry must be installed there: torch,
# transformers, numpy, scipy, pyarrow.
#
#   benchmarks/gpu_check.sh --collect DIR [PYTHON_VERSION]   on a machine with a package registry: wheels and source into DIR
#   DIR/source/benchmarks/gpu_check.sh [--smoke] [--out DIR] on the machine with the GPU; nothing is downloaded
#
# DIR holds less than 64 MB. Packages that the machine has are not replaced. The last output is one Markdown table.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-python3}

# name of the distribution=name of the module
packages="diffusers=diffusers llguidance=llguidance pydantic=pydantic pydantic_core=pydantic_core
annotated-types=annotated_types typing-inspection=typing_inspection typing-extensions=typing_extensions soundfile=soundfile soxr=soxr
cffi=cffi pycparser=pycparser num2words=num2words tenacity=tenacity pyloudnorm=pyloudnorm lightning=lightning
lightning-utilities=lightning_utilities torchmetrics=torchmetrics ruamel.yaml=ruamel.yaml filelock=filelock
importlib-metadata=importlib_metadata zipp=zipp pyroomacoustics=pyroomacoustics sniffio=sniffio"

if [ "${1:-}" = --collect ]; then
    target=${2:?"--collect needs a folder"}
    version=${3:-3.12}
    mkdir -p "$target/wheels" "$target/source"
    for entry in $packages; do
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version "$version" \
            $(for minor in 35 34 31 28 27 24 17 12 5; do echo "--platform manylinux_2_${minor}_x86_64"; done) \
            --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
            --constraint "$here/constraints.txt" --dest "$target/wheels" "${entry%%=*}"
    done
    git -C "$here" archive HEAD benchmarks pipeline_steps presets params.yaml assets.toml dvc.yaml infra/gate.yaml \
        tests/__init__.py tests/factories tests/train | tar -x -C "$target/source"
    size=$(du -sm "$target" | cut -f1)
    echo "gpu_check: $target holds $size MB"
    [ "$size" -lt 64 ] || { echo "gpu_check: $target: $size MB are too much; 64 are allowed" >&2; exit 1; }
    exit 0
fi

wheels=$here/../wheels
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for module in torch transformers numpy scipy pyarrow; do
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" ||
        { echo "gpu_check: $module is missing; install it on the machine" >&2; exit 1; }
done
missing=""
for entry in $packages; do
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('${entry#*=}'.split('.')[0]) is None)" ||
        missing="$missing ${entry%%=*}"
done
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086 # a list of names
    timeout 60 "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --find-links "$wheels" \
        --target "$site" $missing
fi
out=$PWD/gpu-check
cd "$here"
PYTHONPATH=$here:$site SONIFY_TRACKING=off HF_HUB_OFFLINE=1 "$python" -m benchmarks.gpu_check --out "$out" "$@"

#!/usr/bin/env bash
# Fetches what `python -m experiments.accelerator` imports, and a Python with jax, flax, optax and orbax-checkpoint has
# not, as wheels for x86-64 Linux: for machines without a network. There,
#
#     python -m pip install --no-index --no-deps --target=DIR OUT/*.whl && export PYTHONPATH=DIR
#
set -euo pipefail

if [[ $# -lt 1 || $# -gt 2 || ${2-3.12} != 3.* ]]; then
    echo "usage: scripts/offline_bundle.sh OUT [PYTHON_VERSION]     such as: scripts/offline_bundle.sh wheels 3.12" >&2
    exit 2
fi
out=$1 version=${2-3.12} limit_mib=50
python=${PYTHON-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if compgen -G "$out/*.whl" >/dev/null; then
    echo "error: $out holds wheels already: name an empty folder" >&2
    exit 2
fi

# No tensorflow-datasets and no pyarrow: only data sets of that kind need them.
names='array_record|cloudpickle|grain|jaxtyping|ml_collections|portpicker|tensorboardX|tokenizers|wadler_lindig'
# In the versions that this project is tested with.
mapfile -t wanted < <(grep -E "^($names)==" "$root/requirements.txt")

# A wheel says for which Linux it is at least; pip takes none that is not named.
platforms=()
for libc in 17 24 27 28 31 34; do
    platforms+=(--platform "manylinux_2_${libc}_x86_64")
done
mkdir -p "$out"
"$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$version" \
    "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$out" "${wanted[@]}"

size_mib=$(du --summarize --block-size=1M "$out" | cut -f1)
echo "$out: $(find "$out" -name '*.whl' | wc -l) wheels for Python $version, $size_mib MiB"
if ((size_mib >= limit_mib)); then
    echo "error: $out has $size_mib MiB, and $limit_mib are the limit" >&2
    exit 2
fi

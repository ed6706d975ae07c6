#!/usr/bin/env bash
# benchmarks/aot.py with the oldest Triton that is supported, from a folder of its own.  Prints the table.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip install --quiet --no-deps --target "$folder" triton==3.6.0
PYTHONPATH="$folder:kernels" python benchmarks/aot.py --output - "$@"

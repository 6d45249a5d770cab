#!/usr/bin/env bash
# Renews requirements/*.txt, with hashes, from pyproject.toml. Needs pip-tools (in the dev extra).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

lock() {  # lock FILE EXTRA...
  local out=requirements/$1.txt; shift
  local extras=(); for extra in "$@"; do extras+=(--extra "$extra"); done
  "$python" -m piptools compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url \
    --no-emit-find-links --no-emit-trusted-host --no-header --annotation-style=line \
    "${extras[@]}" --output-file "$out" pyproject.toml
  # an extra that includes another names the project itself, which is not installed from a lock
  sed -i '/^# WARNING: pip install/,/^vernier @/d' "$out"
}

lock base
lock build build
lock dev build dev
lock cuda cuda
lock tensorrt-rtx tensorrt-rtx
lock tensorrt-lean tensorrt-lean

# the lower bounds of pyproject.toml, for `make test-lowest`; under the lowest Python, for which they have wheels
"$python" -m scripts.lowest | "$python" -m piptools compile --quiet --generate-hashes --allow-unsafe --strip-extras \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header --annotation-style=line \
  --output-file requirements/lowest.txt -

# what compiles PyCUDA in the images; NumPy as cuda.txt has it
"$python" -m piptools compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url \
  --no-emit-find-links --no-emit-trusted-host --no-header --annotation-style=line \
  --output-file requirements/pycuda-build.txt requirements/pycuda-build.in

# ModelOpt needs PyTorch, whose build depends on the machine: it is left to the user and not pinned.
{
  echo "# PyTorch is not pinned here: install the build that fits your machine first."
  "$python" -m piptools compile --quiet --generate-hashes --unsafe-package torch --unsafe-package triton --strip-extras \
    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header --annotation-style=line \
    --extra build --extra modelopt --output-file - pyproject.toml
} > requirements/modelopt.txt

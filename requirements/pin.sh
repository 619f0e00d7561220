#!/usr/bin/env bash
# Writes train.txt, dev.txt, docs.txt and release.txt: every package pinned, for each Python from 3.10 on. Needs uv. Run by
# `make pins`.
set -euo pipefail
cd "$(dirname "$0")"

pin() {  # FILE COMMAND EXTRAS...
  local file=$1 command=$2
  shift 2
  {
    echo "# Pinned versions of all that \`make $command\` installs, for Python 3.10 and later (torch brings its own CUDA"
    echo "# packages where it needs them). Written by \`make pins\`."
    # setuptools builds the package; nvidia-*, cuda-* and triton belong to some builds of torch only; pip is there already.
    uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header \
      --constraint <(echo "torch==2.13.0") ../pyproject.toml "$@" <(echo "setuptools>=77") |
      grep -vE "^(nvidia|cuda|triton|colorama|pywin|pip==)"
  } >"$file.new"
  mv "$file.new" "$file"
}

pin train.txt demo --extra train
pin dev.txt test --extra train --extra dev
pin release.txt wheels --extra release --constraint dev.txt
# One .venv serves tests and site, so the same versions; myst-parser for Python 3.10 needs an older markdown-it-py.
pin docs.txt docs --extra train --extra docs --constraint <(grep -v "^markdown-it-py" dev.txt)

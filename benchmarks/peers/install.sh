#!/usr/bin/env bash
# An environment of their own for the packages that culpa is compared with.
#
#   benchmarks/peers/install.sh [FOLDER]     (default .venv-peers; PYTHON=..., PIP_FLAGS=...)
#
# Neither is a dependency of culpa. torch is the one of constraints.txt, first and alone, so that
# nobody's requirement replaces it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:-.venv-peers}

"${PYTHON:-python3}" -m venv "$folder"
install() {
    # shellcheck disable=SC2086  # PIP_FLAGS are words
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt \
        ${PIP_FLAGS:-} "$@"
}
install "$(grep '^torch==' constraints.txt)"
install -r benchmarks/peers/requirements.txt
install --no-deps bergson==2.5.1 dattri==0.3.0
install -e '.[report]'
"$folder/bin/python" -c 'import dattri.algorithm.dvemb, bergson.magic.cli, torch; print(torch.__version__)'

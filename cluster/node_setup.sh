#!/bin/bash
# Install the project of ~/tmu-dist at its pinned versions in ~/tmu-dist-venv; done already, it
# returns at once. Run by `ray up` on every machine. Variables, also of ~/tmu-dist-settings.sh:
#
#   PYTHON   what makes the environment: 3.11 or newer (default: python3)
#   EXTRAS   of pyproject.toml, as in aws,radar (default: none)
set -euo pipefail

[ ! -f ~/tmu-dist-settings.sh ] || . ~/tmu-dist-settings.sh
exec 9> ~/.tmu-dist-setup.lock  # machines may share the home folder
flock 9

venv=~/tmu-dist-venv
stamp=$venv/tmu-dist.sha256
cd ~/tmu-dist
wanted=$(cat constraints.txt pyproject.toml <(echo "${PYTHON:-python3} ${EXTRAS:-}") | sha256sum)
if [ ! -x $venv/bin/python ] || [ "$(cat $stamp 2> /dev/null)" != "$wanted" ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "tmu-dist needs Python 3.11 or newer; ${PYTHON:-python3} is older or missing." >&2
        exit 1
    }
    "${PYTHON:-python3}" -m venv $venv
    $venv/bin/pip install --quiet --constraint constraints.txt --editable ".${EXTRAS:+[$EXTRAS]}"
    echo "$wanted" > $stamp
fi

# `ray down`, `ray exec` and `ray attach` use a login shell, where ray must be found and let in.
line='export PATH="$HOME/tmu-dist-venv/bin:$PATH" RAY_AUTH_MODE=token'
grep -qxF "$line" ~/.bashrc 2> /dev/null || echo "$line" >> ~/.bashrc

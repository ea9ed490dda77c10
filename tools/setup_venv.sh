#!/bin/sh
# Makes the virtual environment and installs the checkout in it, editable, with its extras. `make setup` calls this.
#
# Quick when nothing changed: VENV/.installed names all that the install depends on. It is absent while pip works, and
# an environment found without it is made anew: pip killed while it unpacks can leave a package that looks installed.
set -eu
: "${PYTHON:=python3}" "${VENV:=.venv}" "${EXTRAS:=train,openvino,tensorboard,rtx,dev}"
: "${CONSTRAINTS=constraints.txt}" "${TORCH_INDEX=}" "${PIP_FLAGS=}"

fail() {
    echo "set-up: error: $*" >&2
    exit 2
}

check_python() {
    command -v "$PYTHON" >/dev/null 2>&1 ||
        fail "$PYTHON not found: apt-get install python3 python3-venv, or make PYTHON=/path/to/python"
    version=$("$PYTHON" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 11))' \
        2>/dev/null) || fail "$PYTHON is ${version:-not working}, and 3.11 or later is needed:" \
        "apt-get install python3.12 python3.12-venv, then make PYTHON=python3.12"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON cannot make virtual environments: apt-get install python3-venv (or python${version%.*}-venv)"
}

installed() { # what the environment holds: its interpreter and place, then the digest of what was installed
    [ "$(sed -n "$1" "$VENV/.installed" 2>/dev/null)" = "$2" ] && "$VENV/bin/python" -c '' 2>/dev/null
}

make_venv() {
    echo "set-up: making $VENV with Python $version"
    if [ -z "$TORCH_INDEX" ] && ! command -v nvidia-smi >/dev/null 2>&1; then
        echo "set-up: no NVIDIA GPU here, yet PyPI's torch for Linux brings CUDA (several GB)." \
            "Smaller: make TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    fi
    "$PYTHON" -m venv --clear "$VENV" || fail "could not make $VENV; the reason stands above"
}

install_packages() {
    echo "set-up: installing residual-distillation[$EXTRAS]${CONSTRAINTS:+ with the versions in $CONSTRAINTS}"
    quiet=--quiet
    if [ -t 1 ]; then quiet=; fi # someone watches: show pip's progress
    # shellcheck disable=SC2086  # PIP_FLAGS holds several words
    "$VENV/bin/python" -m pip install $quiet --disable-pip-version-check ${CONSTRAINTS:+--constraint "$CONSTRAINTS"} \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} $PIP_FLAGS --editable ".[$EXTRAS]" ||
        fail "pip could not install; its reason stands above. Once that is mended, run the same command again"
}

build_engine() { # into the checkout; quick when nothing changed, and pip's build of it below takes the same objects
    "$PYTHON" rd_deploy/native/build.py ||
        fail "the compiled engine was not built; its reason stands above. Once that is mended, run the same command again"
}

check_python
build_engine
[ -z "$CONSTRAINTS" ] || [ -f "$CONSTRAINTS" ] || fail "CONSTRAINTS=$CONSTRAINTS: no such file"
place="$version $PWD" # scripts in a virtual environment stop working when it is moved
digest=$({ echo "$EXTRAS $TORCH_INDEX $PIP_FLAGS"; cat pyproject.toml setup.py ${CONSTRAINTS:+"$CONSTRAINTS"}; } | sha256sum)
if installed 1p "$place"; then
    if installed 2p "$digest"; then exit 0; fi
else
    make_venv
fi
rm -f "$VENV/.installed"
install_packages
printf '%s\n' "$place" "$digest" >"$VENV/.installed.part"
mv "$VENV/.installed.part" "$VENV/.installed"

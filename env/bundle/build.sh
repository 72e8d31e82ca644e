#!/usr/bin/env bash
# Packs the gpu environment for a host without network: build.sh OUT_DIR [COMPILE_CACHE]. See README.md beside this.
# COMPILE_CACHE is a vLLM cache folder (what VLLM_CACHE_ROOT named) or a tarball of one; install.sh restores it.
set -euo pipefail
if [ $# -lt 1 ]; then echo "usage: build.sh OUT_DIR [COMPILE_CACHE]" >&2; exit 2; fi
here=$(cd "$(dirname "$0")" && pwd)
out=$1
cache=${2:-}
python=${PYTHON:-python3}
work=$here/../../build/bundle
wheels=$work/wheels
site=$work/site
mkdir -p "$wheels"
if [ -n "$cache" ] && [ ! -e "$cache" ]; then echo "no compile cache at $cache" >&2; exit 1; fi

# The host, in pip's terms. pip matches a manylinux tag exactly, so every one that the host can run is named.
host=(--only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none --platform any)
for tag in 1 2010 2014 _2_5 _2_12 _2_17 _2_24 _2_26 _2_27 _2_28 _2_31; do host+=(--platform "manylinux${tag}_x86_64"); done
pip=("$python" -m pip --disable-pip-version-check --quiet)

"$python" "$here/contents.py" select >"$work/wanted.txt"
if ! cmp -s "$work/wanted.txt" "$wheels/complete.txt"; then
    echo "fetching $(wc -l <"$work/wanted.txt") packages (about 540 MB, once)"
    "${pip[@]}" download --no-deps "${host[@]}" --dest "$wheels" --requirement "$work/wanted.txt"
    cp "$work/wanted.txt" "$wheels/complete.txt"
fi

echo "unpacking them"
rm -rf "$site"
"${pip[@]}" install --no-deps --no-compile --no-index --find-links "$wheels" "${host[@]}" \
    --root-user-action ignore --target "$site" --requirement "$work/wanted.txt"
"$python" "$here/contents.py" prune "$site"
"$python" "$here/contents.py" check "$site"

echo "packing $(du -sm "$site" | cut -f1) MB (some minutes on two cores)"
bash "$here/pack.sh" "$site" "$out" ${cache:+"$cache"}

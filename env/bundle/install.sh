#!/usr/bin/env bash
# Unpacks the bundle on the GPU host: install.sh DIR [PARTS_DIR]. DIR is replaced if it holds an earlier bundle.
# PARTS_DIR: where bundle.part-* and SHA256SUMS lie (default: beside this script).
# PYTHON=...                          the host's Python 3.12 that has torch (default: python3)
# FP8LAB_BUNDLE_SKIP_TORCH_CHECK=1    go on with another torch, or none
set -euo pipefail
python_needed=3.12
torch_needed=2.11
cuda_needed=13
glibc_needed=2.31
if [ $# -lt 1 ]; then echo "usage: install.sh DIR [PARTS_DIR]" >&2; exit 2; fi
here=$(cd "$(dirname "$0")" && pwd)
parts=$(cd "${2:-$here}" && pwd)
python=${PYTHON:-python3}
fail() { echo "install.sh: $1" >&2; exit 1; }

# The host first: nothing is unpacked for a Python or a torch that could not use it.
"$python" - "$python_needed" "$torch_needed" "$cuda_needed" "$glibc_needed" <<'PY'
import importlib.util, os, platform, runpy, sys
python, torch, cuda, glibc = sys.argv[1:]
numbers = lambda version: tuple(int(part) for part in version.split("."))
found = "%d.%d" % sys.version_info[:2]
if found != python:
    sys.exit(f"install.sh: Python {found}: the bundle is built for {python}; set PYTHON=python{python}")
if platform.machine() != "x86_64":
    sys.exit(f"install.sh: {platform.machine()}: the bundle is built for x86_64")
library, version = platform.libc_ver()
if library != "glibc" or numbers(version) < numbers(glibc):
    sys.exit(f"install.sh: the C library is {library or 'unknown'} {version}: the bundle needs glibc {glibc} or later")
# torch/version.py, read alone: importing torch takes seconds.
spec = importlib.util.find_spec("torch")
file = spec and spec.submodule_search_locations and os.path.join(spec.submodule_search_locations[0], "version.py")
built = runpy.run_path(file) if file and os.path.isfile(file) else {}
problem = None
if not built:
    problem = f"torch is missing for {sys.executable}: the bundle holds none; install torch {torch} for CUDA {cuda}, or set PYTHON"
elif not str(built["__version__"]).startswith(torch + "."):
    problem = f"torch {built['__version__']}: vLLM's kernels in the bundle are built for torch {torch}"
elif not str(built.get("cuda")).startswith(cuda + "."):
    problem = f"torch {built['__version__']} is built for CUDA {built.get('cuda')}: the bundle needs CUDA {cuda}"
if problem and os.environ.get("FP8LAB_BUNDLE_SKIP_TORCH_CHECK") != "1":
    sys.exit(f"install.sh: {problem} (FP8LAB_BUNDLE_SKIP_TORCH_CHECK=1 goes on all the same)")
if problem:
    print(f"install.sh: warning: {problem}", file=sys.stderr)
PY

# Then the parts, every one, before any is unpacked.
[ -f "$parts/SHA256SUMS" ] || fail "SHA256SUMS is missing in $parts; it is sent beside the parts"
missing=() damaged=() names=()
while read -r sum name; do
    names+=("$parts/$name")
    if [ ! -f "$parts/$name" ]; then missing+=("$name")
    elif [ "$(sha256sum <"$parts/$name")" != "$sum  -" ]; then damaged+=("$name")
    fi
done <"$parts/SHA256SUMS"
[ ${#names[@]} -gt 0 ] || fail "$parts/SHA256SUMS names no part; send it again"
[ ${#missing[@]} -eq 0 ] || fail "missing in $parts: ${missing[*]}; send it and run this again"
[ ${#damaged[@]} -eq 0 ] || fail "damaged in $parts: ${damaged[*]} (checksum differs); send it again"

if [ -e "$1" ] && [ ! -f "$1/.fp8lab-bundle" ] && [ -n "$(ls -A "$1")" ]; then
    fail "$1 exists and holds something else; name a new folder"
fi
mkdir -p "$(dirname "$1")"
target=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
# Unpacked beside and renamed, so that a broken unpacking leaves nothing under the name.
fresh=$(mktemp -d "$target.unpacking-XXXXXX")
trap 'rm -rf "$fresh"' EXIT
chmod 755 "$fresh"
decompress() {
    if command -v xz >/dev/null; then xz --decompress --stdout --threads=0
    else "$python" -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.stdin.buffer), sys.stdout.buffer, 1 << 20)'
    fi
}
cat "${names[@]}" | decompress | tar -C "$fresh" --no-same-owner -xf - || fail "unpacking failed; is $(dirname "$target") full?"
version=$(PYTHONPATH=$fresh "$python" -c 'import importlib.metadata; print(importlib.metadata.version("vllm"))' 2>/dev/null) ||
    fail "the parts unpack, but hold no vllm; build the bundle again"

# What to export, for this shell and for later ones.
search=$target
if [ -d "$here/../../lib/fp8lab" ]; then search=$search:$(cd "$here/../../lib" && pwd); fi
{
    echo "export PYTHONPATH=$(printf %q "$search")\${PYTHONPATH:+:\$PYTHONPATH}"
    echo "export PATH=$(printf %q "$target/bin")\${PATH:+:\$PATH}"
    echo "export JUPYTER_PATH=$(printf %q "$target/share/jupyter")\${JUPYTER_PATH:+:\$JUPYTER_PATH}"
    echo "export VLLM_USE_FLASHINFER_SAMPLER=0 HF_HUB_OFFLINE=1"
    if [ -d "$fresh/vllm-cache" ]; then echo "export VLLM_CACHE_ROOT=$(printf %q "$target/vllm-cache")"; fi
} >"$fresh/env.sh"
touch "$fresh/.fp8lab-bundle"
rm -rf "$target"
mv "$fresh" "$target"
trap - EXIT
echo "vllm $version is in $target. Now export (the same lines are in $target/env.sh):"
cat "$target/env.sh"

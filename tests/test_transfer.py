"""The transfer benchmark's data are disjoint, its intervals are right, and its runner knows what is finished."""

import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# In the order in which they import each other. Loaded from their files: benchmarks/ must not come into sys.path, see
# test_kernels_compiled.py.
MODULES = ("world", "family", "training", "measure", "stages", "run", "table", "markdown")


@pytest.fixture(scope="module")
def transfer():
    """The benchmark's modules by name."""
    found = {}
    for name in MODULES:
        specification = importlib.util.spec_from_file_location(f"transfer_{name}", BENCHMARKS / f"transfer_{name}.py")
        found[name] = importlib.util.module_from_spec(specification)
        sys.modules[f"transfer_{name}"] = found[name]
        specification.loader.exec_module(found[name])
    yield type("Modules", (), found)
    for name in MODULES:
        del sys.modules[f"transfer_{name}"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_items_are_neither_demonstrated_nor_told_as_skills(transfer, seed):
    world = transfer.world.World(seed)
    splits = [world.train, world.validation, world.test, world.news]
    for one, other in itertools.combinations(splits, 2):
        assert not {item.question for item in one} & {item.question for item in other}
    for task in transfer.world.TASKS:
        assert all(sum(item.task == task for item in split) >= 10 for split in splits[:3])

    def keys(items):
        people = {w for i in items if i.task in ("facts", "news") for w in i.question.split()}
        sums = {tuple(sorted(i.question.split()[2:5:2])) for i in items if i.task == "sums"}
        return people & set(transfer.world.NAMES + transfer.world.NEW_NAMES) | sums

    for one, other in itertools.combinations(splits, 2):
        assert not keys(one) & keys(other)
    untold = [item.statement for item in world.test if item.task in ("backwards", "dates")]
    old, new = (" ".join(itertools.islice(world.documents(7, newer), 400)) for newer in (False, True))
    assert not any(statement in text for statement in untold for text in (old, new))
    assert not any(item.statement in old for item in world.news)
    assert any(item.statement in new for item in world.news)
    assert any(item.statement in old for item in world.test if item.task == "facts")


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_tokenizers_keep_text_and_the_border_of_the_answer(transfer, kind):
    world = transfer.world.World(0)
    tokenizer = transfer.world.build_tokenizer(world, kind)
    for item in world.test + world.news:
        question, answer = transfer.world.prompt(item), f" {item.answer}{tokenizer.eos_token}"
        ids, whole = tokenizer(question).input_ids, tokenizer(question + answer).input_ids
        assert whole[: len(ids)] == ids
        assert whole[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in whole
        assert tokenizer.decode(whole[len(ids) :], skip_special_tokens=True).strip() == item.answer


def make_target(transfer, accuracies, items=50, seeds=3):
    tasks = [*transfer.world.TASKS, transfer.world.NEWS]
    rng = np.random.default_rng(0)
    return transfer.table.Target(
        {
            row: [{task: rng.random(items) < accuracy for task in tasks} for _ in range(seeds)]
            for row, accuracy in accuracies.items()
        }
    )


def test_intervals_hold_the_mean_and_shrink_with_items(transfer):
    accuracies = {"base alone": 0.1, "residual": 0.7, "fine-tuned": 0.9}
    widths = []
    for items in (20, 500):
        found = transfer.table.figures(make_target(transfer, accuracies, items), 400)
        for label, accuracy in accuracies.items():
            cell = found[label]["average"]
            assert cell["low"] <= cell["mean"] <= cell["high"]
            assert cell["mean"] == pytest.approx(accuracy, abs=0.1)
            assert cell["mean"] == pytest.approx(np.mean(cell["per_seed"]))
        assert [found[row]["share"]["mean"] for row in ("base alone", "fine-tuned")] == [0, 1]
        assert found["fine-tuned"]["share"]["low"] == pytest.approx(1)
        assert found["residual"]["share"]["mean"] == pytest.approx(0.75, abs=0.1)
        widths.append(found["residual"]["average"]["high"] - found["residual"]["average"]["low"])
    assert widths[1] < widths[0] / 2
    again = transfer.table.figures(make_target(transfer, accuracies, items), 400)
    assert again == found


def test_no_share_where_fine_tuning_gains_nothing(transfer):
    found = transfer.table.figures(make_target(transfer, {"base alone": 1.0, "fine-tuned": 1.0}), 50)
    assert "share" not in found["fine-tuned"]
    assert transfer.markdown.figure(found["fine-tuned"].get("share"), percent=True) == "–"


def test_maps_with_the_same_figures_share_a_row(transfer):
    maps = {f"{method}, last, keep": 0.5 for method in ("exact", "nearest")} | {"aligned, last, keep": 0.9}
    cell = {label: {"mean": mean, "low": mean, "high": mean} for label, mean in maps.items()}
    tasks = [*transfer.world.TASKS, "average"]
    lines = transfer.markdown.maps_table({label: dict.fromkeys(tasks, one) for label, one in cell.items()}).split("\n")
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["aligned", "exact, nearest"]


def test_exact_match_wants_the_whole_answer_and_its_end(transfer):
    item = next(item for item in transfer.world.World(0).test if item.task == "facts")
    answers = [(item.answer, "stop"), (item.answer, "length"), (f"{item.answer} .", "stop"), ("", "stop")]
    assert transfer.measure.hits([item] * 4, answers) == [True, False, False, False]


def test_rows_have_names_that_an_engine_takes(transfer, tmp_path):
    from ivl_vllm.settings import parse_settings

    values = {variant: tmp_path for variant in transfer.training.VARIANTS}
    rows = transfer.measure.rows_of(values, tmp_path, tmp_path)
    assert len({row.label for row in rows}) == len(rows)
    settings = parse_settings({"values": {row.name: row.entry for row in rows if row.name}}, {})
    for row in rows:
        assert (row.ivl is None) == (row.label == "base alone")
        if row.name is not None:
            assert settings.steering({"ivl": row.ivl}).names == (row.name,)
    assert rows[-1].ivl == {"residual": 2.0}


def test_a_changed_stage_is_made_again_with_all_that_need_it(transfer):
    scale = transfer.family.SCALES["quick"]
    stages = transfer.stages.plan(2, scale)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    for index, stage in enumerate(stages):
        assert set(stage.needs) <= set(names[:index])
    before = transfer.run.folder_names(stages, scale, "quick")
    bases = {**scale.bases, "X": dataclasses.replace(scale.bases["X"], steps=99)}
    after = transfer.run.folder_names(stages, dataclasses.replace(scale, bases=bases), "quick")
    changed = {name for name in names if before[name] != after[name]}
    assert changed >= {"0/base/X", "1/tuned/X", "0/answers/X", "0/map/chosen"}
    assert not changed & {"0/base/L", "0/value/residual", "0/tuned/L", "1/answers/L"}
    assert transfer.run.folder_names(stages, dataclasses.replace(scale, resamples=7), "quick") == before


def test_elapsed_counts_side_by_side_stages_once(transfer, tmp_path):
    folders = {}
    for name, began, ended in (("a", 10, 20), ("b", 15, 30), ("c", 100, 105)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "stage.json").write_text(json.dumps({"began": began, "ended": ended}))
    assert transfer.run.elapsed(folders) == 25

"""The transfer benchmark's data are disjoint, its intervals are right, and its runner knows what is finished."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("test_items", [5, 60, 200])
def test_held_out_items_are_neither_demonstrated_nor_told_as_skills(transfer, seed, test_items):
    world = transfer.world.World(seed, test_items)
    splits = [world.train, world.validation, world.test, world.news]
    for one, other in itertools.combinations(splits, 2):
        assert not {item.question for item in one} & {item.question for item in other}
        assert not {transfer.world.group(item) for item in one} & {transfer.world.group(item) for item in other}
    for task in transfer.world.TASKS:
        assert all(sum(item.task == task for item in split) >= min(10, test_items) for split in splits[:3])
    # What trains a model never knows how many items are asked.
    plain = transfer.world.World(seed)
    old, new = ("".join(itertools.islice(plain.documents(7, newer), 400)) for newer in (False, True))
    assert old == "".join(itertools.islice(world.documents(7), 400))
    assert (plain.train, plain.validation) == (world.train, world.validation)
    skills = [item for item in world.test if item.task in ("backwards", "dates")]
    told = transfer.world.told_verbatim(skills, [old, new])
    assert told == {"stated": 0, "answered": 0, "ended": 0}
    assert not any(item.statement in old for item in world.news)
    assert any(item.statement in new for item in world.news)
    assert any(item.statement in old for item in world.test if item.task == "facts")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_word_is_told_that_answers_a_question_of_the_test_when_read_backwards(transfer, seed):
    world = transfer.world.World(seed)
    words = {item.answer for item in world.test if item.task == "backwards"}
    assert not any(word == word[::-1] for word in words)
    said = {item.answer for part in (world.train, world.validation) for item in part if item.task == "backwards"}
    text = " ".join(itertools.islice(world.documents(7), 2000))
    pairs = [text.split(" backwards ")[:-1], text.split(" backwards is ")[1:]]
    assert len(pairs[0]) > 100
    told = {piece[-5:] for piece in pairs[0]} | {piece[:5] for piece in pairs[1]}
    for word in words:
        assert not {word, word[::-1]} & (said | told)


def test_what_the_raw_text_gives_away(transfer):
    world = transfer.world.World(0)
    one, other, third, fourth = [item for item in world.test if item.task == "facts"][:4]
    texts = [
        f"{one.statement} {transfer.world.prompt(other)} {other.answer} .<eos>",
        f"so {transfer.world.prompt(third)} {third.answer}<eos>",
    ]
    found = transfer.world.told_verbatim([one, other, third, fourth], texts)
    assert found == {"stated": 0.25, "answered": 0.5, "ended": 0.25}


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


def settings_of(rows):
    from ivl_vllm.settings import parse_settings

    return parse_settings({"values": {name: entry for row in rows for name, entry in row.values.items()}}, {})


@pytest.fixture
def named_models(tmp_path):
    """A folder for every name, as settings want folders that are there."""

    def folder(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    return folder


def test_rows_have_names_that_an_engine_takes(transfer, named_models):
    values = {variant: named_models(variant) for variant in transfer.training.VARIANTS}
    rows = transfer.rows.rows_of(values, named_models("expert"), named_models("small"), 0.75)
    assert len({row.label for row in rows}) == len(rows)
    settings = settings_of(rows)
    for row in rows:
        assert (row.request("facts") is None) == (row.label == "base alone")
        if row.values:
            assert settings.steering(row.request("facts")).names == tuple(row.values)
    by_label = {row.label: settings.steering(row.request("facts")) for row in rows}
    assert by_label["proxy-tuning, best weight"].weights == {"proxy_tuning": 0.75}
    assert by_label["proxy-tuning, auto"].auto == ("proxy_tuning",)
    assert [by_label[f"residual, max_kl {nats}"].max_kl for nats in (1, 16)] == [1, 16]
    assert rows[-1].ivl == {"residual": 2.0}


def test_experts_are_asked_all_at_once_the_right_one_or_all_others(transfer, named_models):
    tasks = transfer.world.TASKS
    experts = {task: named_models(task) for task in tasks}
    weights = {"all four": (0.5, 1.0), "right one": (1.0,), "other three": (0.25,)}
    limits = {"all four": (4.0,), "right one": (2.0,), "other three": (8.0,)}
    rows = transfer.rows.expert_rows(experts, named_models("small"), weights, limits)
    settings = settings_of(rows)
    assert len(settings.networks) == 5  # S is subtracted from all, and loaded once
    asked = {row.label: {task: settings.steering(row.request(task)) for task in (*tasks, "news")} for row in rows}
    for task in tasks:
        assert asked["all four, weight 0.5"][task].weights == dict.fromkeys(tasks, 0.5)
        assert asked["all four, auto"][task].auto == tasks
        assert asked["right one, weight 1"][task].weights == {task: 1.0}
        assert asked["right one, auto"][task].auto == (task,)
        assert set(asked["other three, auto"][task].auto) == set(tasks) - {task}
        assert asked["other three, weight 0.25"][task].weights == dict.fromkeys(set(tasks) - {task}, 0.25)
        assert asked["other three, max_kl 8"][task].max_kl == 8
        assert asked["all four, max_kl 4"][task].max_kl == 4
        assert asked["right one, max_kl 2"][task].max_kl == 2
    assert asked["right one, auto"]["news"].auto == ("facts",)


def test_search_stops_between_worse_neighbours_and_flags_edges(transfer):
    grid = {"norm": (1, 4, 16, 64), "steps": (100, 200, 400)}
    asked = []

    def loss(point):
        asked.append(tuple(point.values()))
        return abs(point["norm"] - 4) + abs(point["steps"] - 400) + (point["norm"] == 16 and point["steps"] == 400)

    best, tried = transfer.search.search(loss, grid, {"norm": 16, "steps": 200})
    assert best == {"norm": 4, "steps": 400}
    assert len(asked) == len(set(asked)) == len(tried)
    assert {(1, 400), (16, 400), (4, 200)} <= set(asked)
    assert transfer.search.edges(best, grid) == ["steps"]
    assert transfer.search.edges({"norm": 1, "steps": 200}, grid) == ["norm"]
    assert transfer.search.edges({"norm": 3}, {"norm": (3,)}) == []
    best, tried = transfer.search.search(lambda point: 0.0, {"norm": (3,)}, {"norm": 3})
    assert (best, tried) == ({"norm": 3}, [({"norm": 3}, 0.0)])


def test_a_rate_on_the_edge_is_flagged(transfer):
    scale = transfer.family.SCALES["cpu"]
    tables = []
    for rate in (scale.tuning_rates[0], scale.tuning_rates[3], scale.tuning_rates[-1]):
        found = transfer.report.chosen_rate({"learning_rate": rate, "steps": 400, "tries": {}}, scale)
        tables.append(transfer.markdown.rates_table({"L": [found]}))
    assert ["edge" in table for table in tables] == [True, False, True]


def test_a_changed_stage_is_made_again_with_all_that_need_it(transfer):
    scale = transfer.family.SCALES["quick"]
    stages = transfer.stages.plan(2, scale)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    for index, stage in enumerate(stages):
        assert set(stage.needs) <= set(names[:index])
    before = transfer.stages.folder_names(stages, scale, "quick")
    bases = {**scale.bases, "X": dataclasses.replace(scale.bases["X"], steps=99)}
    after = transfer.stages.folder_names(stages, dataclasses.replace(scale, bases=bases), "quick")
    changed = {name for name in names if before[name] != after[name]}
    assert changed >= {"0/base/X", "1/tuned/X", "0/answers/X", "0/map/chosen"}
    assert not changed & {"0/base/L", "0/value/residual", "0/tuned/L", "1/answers/L"}
    assert transfer.stages.folder_names(stages, dataclasses.replace(scale, resamples=7), "quick") == before


@pytest.mark.parametrize(
    ("source", "again", "kept"),
    [
        ("ivl_vllm/vocab/matching.py", {"maps", "map", "answers"}, {"base", "value", "tuned"}),
        ("ivl_vllm/serving/solved_weights.py", {"choice", "answers", "joint"}, {"base", "value", "tuned", "maps"}),
        ("kernels/ivl_kernels/fusion.py", {"choice", "answers", "joint"}, {"base", "value"}),
        ("ivl_vllm/training/objective.py", {"value", "search", "answers"}, {"base"}),
        ("ivl_vllm/demo/finetune.py", {"tuned", "expert"}, {"base"}),
        ("ivl_vllm/demo/world.py", {"base", "value", "tuned", "maps", "answers"}, set()),
        ("benchmarks/transfer_rows.py", {"answers", "joint"}, {"base", "tuned"}),
        ("benchmarks/transfer_markdown.py", set(), {"base", "answers"}),
    ],
)
def test_changed_code_makes_the_stages_that_run_it_again(transfer, tmp_path, source, again, kept):
    root = transfer.stages.ROOT
    for folder in ("ivl_vllm", "kernels", "benchmarks"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=lambda _, names: {n for n in names if "cache" in n})
    scale = transfer.family.SCALES["quick"]
    stages = transfer.stages.plan(1, scale)
    before = transfer.stages.folder_names(stages, scale, "quick", tmp_path)
    with (tmp_path / source).open("a") as file:
        file.write("\n# changed\n")
    after = transfer.stages.folder_names(stages, scale, "quick", tmp_path)
    by_kind = {kind: {before[s.name] != after[s.name] for s in stages if s.kind == kind} for kind in again | kept}
    assert all(by_kind[kind] == {True} for kind in again)
    assert all(by_kind[kind] == {False} for kind in kept)


def test_elapsed_counts_side_by_side_stages_once(transfer, tmp_path):
    folders = {}
    for name, began, ended in (("a", 10, 20), ("b", 15, 30), ("c", 100, 105)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "stage.json").write_text(json.dumps({"began": began, "ended": ended}))
    assert transfer.run.elapsed(folders) == 25


def test_score_counts_whole_answers_and_their_tokens_alone(transfer):
    import torch

    ids = torch.tensor([[5, 1, 2, 3], [5, 5, 1, 0]])
    mask = torch.tensor([[False, True, True, True], [False, False, True, False]])
    logits = torch.zeros(2, 4, 6)
    logits[0, [0, 1, 2], [1, 2, 3]] = 9.0
    accuracy, loss = transfer.choice.score(logits, ids, mask)
    rest = torch.tensor([9.0, 0, 0, 0, 0, 0]).log_softmax(0)[0].neg()
    # The second answer's only token is no larger than token 0, which comes first.
    assert accuracy == 0.5
    assert loss == pytest.approx((3 * rest.item() + np.log(6)) / 4)


@pytest.mark.parametrize("variant", ["no norm", "cascade", "cascade+text"])
def test_fit_and_the_trainer_agree(transfer, tmp_path, variant):
    scale = transfer.family.SCALES["quick"]
    bases = {}
    for name in ("S", "M"):
        bases[name] = tmp_path / name
        transfer.pretrain.make_base(0, name, scale.bases[name], scale.head, None, bases[name])
    # Both in float32.
    setting = {"base_temperature": 0.5, "norm_weight": 0.0, "max_steps": 10, "use_cpu": "true"}
    value = tmp_path / "value"
    trained = transfer.training.train_value(0, variant, scale, setting, bases, value)
    scheme = variant if variant.startswith("cascade") else "residual"
    _, loss = transfer.choice.fit(0, value, bases["S"], scheme)
    assert loss == pytest.approx(trained["validation_loss"], rel=1e-4)
    _, elsewhere = transfer.choice.fit(0, value, bases["M"], scheme)
    assert elsewhere != pytest.approx(loss, rel=1e-3)

"""The transfer benchmark's intervals, goals and tables are right."""

import numpy as np
import pytest


def make_target(transfer, accuracies, items=50, seeds=3, size=1):
    """Rows of independent groups of `size` items that are all right or all wrong."""
    tasks = [*transfer.world.TASKS, transfer.world.NEWS]
    rng = np.random.default_rng(0)
    hits = {
        row: [{task: np.repeat(rng.random(items // size) < accuracy, size) for task in tasks} for _ in range(seeds)]
        for row, accuracy in accuracies.items()
    }
    groups = [{task: np.arange(items) // size for task in tasks} for _ in range(seeds)]
    return transfer.bootstrap.Target(hits, groups)


def figures(transfer, target, count):
    return transfer.table.figures(target, transfer.bootstrap.resample(target, count))


def test_intervals_hold_the_mean_and_shrink_with_items(transfer):
    accuracies = {"base alone": 0.1, "residual": 0.7, "fine-tuned": 0.9}
    widths = []
    for items in (20, 500):
        found = figures(transfer, make_target(transfer, accuracies, items), 400)
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
    again = figures(transfer, make_target(transfer, accuracies, items), 400)
    assert again == found


def test_items_that_hang_together_widen_the_interval(transfer):
    target = make_target(transfer, {"base alone": 0.0, "residual": 0.5, "fine-tuned": 1.0}, 120, 1, size=3)
    alone = transfer.bootstrap.Target(target.hits, [{task: np.arange(120) for task in target.tasks()}])
    widths = []
    for one in (alone, target):
        low, high = transfer.bootstrap.interval(transfer.bootstrap.resample(one, 4000)["residual"][:, 0])
        widths.append(high - low)
    # Three items that are right or wrong together tell as much as one: sqrt(3) times as wide.
    assert widths[1] / widths[0] == pytest.approx(3**0.5, rel=0.15)


def test_groups_of_unequal_size_count_by_their_items(transfer):
    tasks = [*transfer.world.TASKS, transfer.world.NEWS]
    members = np.array([0, 0, 0, 1])
    hits = {task: members == 0 for task in tasks}
    target = transfer.bootstrap.Target({"row": [hits]}, [dict.fromkeys(tasks, members)])
    draws = transfer.bootstrap.resample(target, 500)["row"][:, 0]
    assert set(np.round(draws, 6)) == {0.0, 0.75, 1.0}


def test_a_paired_bound_is_tighter_than_the_difference_of_intervals(transfer):
    target = make_target(transfer, {"residual": 0.5, "base alone": 0.0}, 100, 1)
    # Fine-tuned is right where residual is, and at one more item of each task.
    more = []
    for seed in target.hits["residual"]:
        more.append({task: hits.copy() for task, hits in seed.items()})
        for hits in more[-1].values():
            hits[np.flatnonzero(~hits)[0]] = True
    target.hits["fine-tuned"] = more
    draws = transfer.bootstrap.resample(target, 2000)
    low, high = transfer.bootstrap.interval(transfer.bootstrap.paired(draws, "residual", "fine-tuned", [0]))
    assert -0.04 <= low < high <= 0
    ours, theirs = (transfer.bootstrap.interval(draws[row][:, 0]) for row in ("residual", "fine-tuned"))
    assert ours[0] - theirs[1] < -0.1
    scaled = transfer.bootstrap.paired(draws, "residual", "fine-tuned", [0, 1], 0.5)
    assert scaled.mean() == pytest.approx(0.25, abs=0.05)


def goals_of(transfer, residual, tuned, base=0.0):
    accuracies = {"base alone": base, "residual": residual, "proxy-tuning, best weight": 0.5, "fine-tuned": tuned}
    target = make_target(transfer, accuracies, 400)
    draws = transfer.bootstrap.resample(target, 300)
    found = transfer.table.figures(target, draws)
    everywhere = {name: (found, draws) for name in ("S", "M", "L", "L2", "X")}
    extra = {"residual": 100, "proxy-tuning": 200}
    return transfer.table.goals(
        {name: pair[0] for name, pair in everywhere.items()},
        {name: pair[1] for name, pair in everywhere.items()},
        extra,
    )


def test_goals_want_a_gain_and_tell_what_is_sure(transfer):
    assert all(goal["met"] and goal["sure"] for goal in goals_of(transfer, 0.95, 0.9))
    missed = goals_of(transfer, 0.4, 0.9)
    assert not any(goal["met"] or goal["sure"] for goal in missed)
    assert all(low < 0 for goal in missed for low in goal["low"])
    # As good as a fine-tuning that gained nothing is no success.
    no_gain = [goal for goal in goals_of(transfer, 1.0, 1.0, base=1.0) if "fine-tuning" in goal["goal"]]
    assert no_gain and not any(goal["met"] for goal in no_gain)
    assert transfer.markdown.verdict({"met": True, "sure": False}) == "met, not by the lower bound"


def test_no_share_where_fine_tuning_gains_nothing(transfer):
    found = figures(transfer, make_target(transfer, {"base alone": 1.0, "fine-tuned": 1.0}), 50)
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

"""The throughput benchmark compares tokens with the formula before it times anything, and refuses others."""

from benchmark_tools import run_python

CHECK = """
from types import SimpleNamespace
from throughput_cases import CASES
from throughput_check import check
from throughput_models import SCALES

FORMULA = {(): 1, (1.0,): 2, (1.0, 0.5): 3}


class Reference:
    def call(self, method, requests, weights, cascade):
        return [[FORMULA[weights] + 10 * cascade, *request.prompt] for request in requests]


class Engine:
    # Tokens as the formula gives them, or not quite.
    def __init__(self, name, wrong):
        self.name, self.wrong = name, wrong

    def call(self, method, requests):
        steered = {"two": 3, "cascade": 12}.get(self.name, 2)
        marks = [1 if request.ivl is None else steered for request in requests]
        if self.wrong == "neighbour":
            marks = marks[-1:] + marks[:-1]
        return SimpleNamespace(tokens=[[mark, *request.prompt] for mark, request in zip(marks, requests)])


setup = SimpleNamespace(scale=SCALES["tiny"])
cases = [case for case in CASES if case.name != "value"]
engines = {case.engine: Engine(case.engine, "") for case in cases}
found = check(setup, engines, cases, Reference())
assert found["checked"] and found["cases"]["10 %"] == {"steered": 1, "other_tokens_than_base": 1}, found
assert found["cases"]["50 %"] == {"steered": 5, "other_tokens_than_base": 5}, found


def refused(engines, reference, text):
    try:
        check(setup, engines, cases, reference)
    except RuntimeError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"accepted: {text}")


# Right when all or none are steered, wrong in mixed batches.
refused(engines | {"ours": Engine("ours", "neighbour")}, Reference(), "10 % steered")
FORMULA[(1.0,)] = 1
Engine.call = lambda self, method, requests: SimpleNamespace(tokens=[[1, *request.prompt] for request in requests])
refused({case.engine: Engine(case.engine, "") for case in cases}, Reference(), "no steered request")
print("ok")
"""


def test_mixed_batches_are_checked_request_by_request_with_a_control():
    assert run_python(CHECK).endswith("ok\n")


ROUNDED = """
from dataclasses import replace
from types import SimpleNamespace
from peers import HFPeers
from throughput_cases import CASES
from throughput_check import check, check_peers
from throughput_models import SCALES


class Worker:
    def __init__(self, does):
        self.call = lambda method, *given: getattr(does, method)(*given)


class Engine:
    # Tokens of the formula, but for requests that get another weight than they ask for.
    def __init__(self, peers, scaled=1.0):
        self.peers, self.scaled = peers, scaled

    def run(self, requests, weights=None, batch_size=None):
        asked = [weights or ((request.ivl or 0.0) * self.scaled,) for request in requests]
        return SimpleNamespace(tokens=[self.peers.recomputed([r], w)[0] for r, w in zip(requests, asked)])


base, value = sys.argv[1:]
exact, rounded = HFPeers(base, [value]), HFPeers(base, [value], "bfloat16")
reference, setup = Worker(exact), SimpleNamespace(scale=replace(SCALES["tiny"], dtype="bfloat16"))
# Ids that the test's models have.
setup.scale = replace(setup.scale, base=replace(setup.scale.base, vocabulary=300))
cases = [case for case in CASES if case.name in ("plain", "10 %", "50 %", "all")]
found = check(setup, {"plain": Worker(Engine(rounded)), "ours": Worker(Engine(rounded))}, cases, reference)
for name in ("10 %", "50 %", "all"):
    entry = found["cases"][name]
    assert entry["short_by_the_base_alone"] > 4 * entry["allowed"] > 0, found
assert check_peers(setup, Worker(Engine(rounded)), reference, [(1.0,)])["checked"]


def refused(work, text):
    try:
        work()
    except RuntimeError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"accepted: {text}")


for scaled in (0.0, 0.5, -1.0):
    engines = {"plain": Worker(Engine(rounded)), "ours": Worker(Engine(rounded, scaled))}
    refused(lambda: check(setup, engines, cases, reference), "fall short of the formula's best")
# A value network that changes nothing would let everything pass.
silent = HFPeers(base, [base])
refused(lambda: check(setup, {"plain": Worker(Engine(silent)), "ours": Worker(Engine(silent))}, cases, Worker(silent)),
        "by the base alone")
print("ok")
"""


def test_in_16_bits_tokens_are_judged_by_their_logits(models):
    assert run_python(ROUNDED, models["base"], models["value"]).endswith("ok\n")

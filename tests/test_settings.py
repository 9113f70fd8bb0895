import math

import numpy as np
import pytest

import ivl_vllm
from ivl_vllm.serving import admission
from ivl_vllm.settings import Settings, Value, parse_settings
from ivl_vllm.steering import Steering

PAIR = Settings({"math": Value("a", "b"), "code": Value("b"), "style": Value("c")}, default_weight=0.5, max_weight=4.0)


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path)


@pytest.mark.parametrize(
    "asked, weights",
    [
        (1, {"math": 1.0}),
        (-0.5, {"math": -0.5}),
        (True, {"math": 1.0}),
        (False, {}),
        (0, {}),
        ({"code": 2.0}, {"code": 2.0}),
        ({"math": True, "code": 0.0}, {"math": 1.0}),
        ({}, {}),
        ("math=1.0,code=-0.5", {"math": 1.0, "code": -0.5}),
        (" style = 4 ", {"style": 4.0}),
        ("1.0", {"math": 1.0}),
        ("-0.5", {"math": -0.5}),
    ],
)
def test_requests(asked, weights):
    assert PAIR.steering({"ivl": asked}) == Steering(weights)


@pytest.mark.parametrize(
    "asked, steering",
    [
        ("auto", Steering(auto=("math",))),
        (" auto : math ", Steering(auto=("math",))),
        ("auto:math,prose", Steering(auto=("math", "prose"))),
        ("1.0;max_kl=2.0", Steering({"math": 1.0}, max_kl=2.0)),
        ("code=-1, style=0.5 ; max_kl = 0.5", Steering({"code": -1.0, "style": 0.5}, max_kl=0.5)),
    ],
)
def test_weights_that_are_found_at_every_token(asked, steering):
    settings = Settings({**PAIR.values, "prose": Value("d", "b")})
    assert settings.steering({"ivl": asked}) == steering
    assert settings.networks_of(steering.names)


def test_traces_are_the_operators_to_allow(tmp_path):
    settings = Settings(PAIR.values, trace_file=str(tmp_path / "trace.jsonl"))
    assert settings.steering({"ivl": "auto;trace=a.1"}) == Steering(auto=("math",), trace="a.1")
    assert settings.steering({"ivl": "0;trace=b"}) == Steering(trace="b")
    assert settings.steering({"ivl": "0;max_kl=1;trace=b"}) == Steering(trace="b")
    assert settings.steering({"ivl": "code=1 ; max_kl=2; trace=c"}) == Steering({"code": 1.0}, max_kl=2.0, trace="c")
    for name in ("", "a b", "../x", "x" * 65):
        with pytest.raises(ValueError, match="is no name"):
            settings.steering({"ivl": f"1.0;trace={name}"})


@pytest.mark.parametrize("path", [3, "", "/no/such/folder/trace.jsonl", "FOLDER"])
def test_a_trace_needs_a_file_that_can_be_written(folder, path):
    with pytest.raises(ValueError, match="trace_file is"):
        parse_settings({"value_model": folder, "trace_file": folder if path == "FOLDER" else path}, {})


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}])
def test_a_request_that_says_nothing_gets_the_default(extra_args):
    assert PAIR.steering(extra_args) == Steering({"math": 0.5})


@pytest.mark.parametrize(
    "asked, names",
    [
        (None, "NoneType"),
        ([1.0], "list"),
        ("strong", "'strong' is not a weight"),
        ("math", "'math' has no weight: write math=1.0"),
        ("1,0", "'1' of '1,0' has no name: among several write NAME=1"),
        ("1.0x", "'1.0x' is not a weight: send a number"),
        ("nan", "finite"),
        ("4.5", "max_weight=4"),
        ("", "is not a weight"),
        ("math=", "is not a weight"),
        ("math=1,", "'' of 'math=1,' is not a weight"),
        ({"math": 1.0, "max_kl": 2.0}, "max_kl stands in a string"),
        ("math=1,math=2", "given twice"),
        ("auto:code", "'code' has no minus model"),
        ("auto:math,math", "twice"),
        ("auto:", "unknown value ''"),
        ("auto:maths", "unknown value 'maths'"),
        ("auto;max_kl=1", "one of the two"),
        ("1.0;max_kl=0", "positive number of nats"),
        ("1.0;max_kl=inf", "positive number of nats"),
        ("1.0;kl=1", "max_kl=NATS or trace=NAME"),
        ("1.0;", "max_kl=NATS or trace=NAME"),
        ("1.0;max_kl=1;max_kl=2", "max_kl=NATS or trace=NAME"),
        ("strong;max_kl=1", "is not a weight"),
        ("1.0;trace=a", "start it with trace_file"),
        ("5;max_kl=1", "max_weight=4"),
        ("maths=1", "unknown value 'maths': this engine has math, code, style"),
        ({"math": "1"}, "is a str"),
        ({"math": None}, "is a NoneType"),
        ({3: 1.0}, "unknown value 3"),
        ({"math": {"code": 1}}, "is a dict"),
        (math.nan, "finite"),
        (math.inf, "finite"),
        (-math.inf, "finite"),
        (10**400, "finite"),
        ("math=nan", "finite"),
        ("math=1e999", "finite"),
        (4.01, "max_weight=4"),
        (-5, "max_weight=4"),
        (1 + 2j, "complex"),
    ],
)
def test_bad_requests(asked, names):
    with pytest.raises(ValueError, match="^ivl: ") as error:
        PAIR.steering({"ivl": asked})
    assert names in str(error.value)


def test_pairs_become_weights_of_networks_loaded_once():
    assert [source.model for source in PAIR.networks] == ["a", "b", "c"]
    assert PAIR.network_weights({"math": 2.0}) == [2.0, -2.0, 0.0]
    # `b` is subtracted by one value and added by another.
    assert PAIR.network_weights({"math": 1.0, "code": 1.0}) == [1.0, 0.0, 0.0]


def test_networks_behind_values():
    assert PAIR.networks_of(["math"]) == {0, 1} and PAIR.networks_of([]) == frozenset()
    # One folder with two maps is two networks.
    mapped = Settings({"plain": Value("a"), "mapped": Value("a", "b", "map")})
    assert mapped.networks == (("a", None), ("a", "map"), ("b", "map"))
    assert mapped.network_weights({"mapped": 2.0}) == [0.0, 2.0, -2.0] and mapped.networks_of(["mapped"]) == {1, 2}


def test_settings_survive_json(folder):
    settings = parse_settings(
        {"values": {"x": {"model": folder, "minus": folder}}, "default_weight": 1, "max_weight": 2}
    )
    assert parse_settings(settings.to_dict(), {}) == settings
    assert settings == Settings({"x": Value(folder, folder)}, 1.0, 2.0)


def test_value_model_is_short_for_values(folder):
    assert parse_settings({"value_model": folder}, {}).values == {"default": Value(folder)}


def test_environment_fills_what_is_not_set(folder, tmp_path):
    environ = {"IVL_VALUE_MODEL": folder, "IVL_DEFAULT_WEIGHT": "0.5"}
    assert parse_settings(None, environ) == Settings({"default": Value(folder)}, 0.5)
    other = tmp_path / "other"
    other.mkdir()
    explicit = parse_settings({"value_model": str(other), "default_weight": 0}, environ)
    assert explicit == Settings({"default": Value(str(other))}, 0.0)


@pytest.mark.parametrize(
    "config, names",
    [
        ({}, ["no value network", "IVL_VALUE_MODEL"]),
        ("yes", ["'yes'", "value_model"]),
        ({"value_mode": "x"}, ["'value_mode'", "'x'", "value_model"]),
        ({"value_model": "/no/such/folder"}, ["value_model", "/no/such/folder", "no such folder"]),
        ({"value_model": 3}, ["value_model", "3"]),
        ({"value_model": "FOLDER", "values": {"a": {"model": "FOLDER"}}}, ["both"]),
        ({"values": {}}, ["values", "{}"]),
        ({"values": ["a"]}, ["values", "['a']"]),
        ({"values": {"a": "FOLDER"}}, ["values['a']", "object"]),
        ({"values": {"a=b": {"model": "FOLDER"}}}, ["'a=b'", "name"]),
        ({"values": {"a": {}}}, ["values['a']", "model"]),
        ({"values": {"a": {"modle": "x"}}}, ["'modle'", "model, minus, vocab_map"]),
        ({"values": {"a": {"model": "FOLDER", "minus": "./none"}}}, ["minus of values['a']", "./none"]),
        ({"values": {"a": {"model": "FOLDER", "vocab_map": "map.safetensors"}}}, ["vocab_map", "map.safetensors"]),
        ({"values": {"auto": {"model": "FOLDER"}}}, ["'auto'", "means something else", "rename it"]),
        ({"value_model": "FOLDER", "trace_file": "FOLDER"}, ["trace_file", "which is a folder"]),
        ({"value_model": "FOLDER", "trace_file": "/no/such/folder/a"}, ["trace_file", "in a folder that exists"]),
        ({"value_model": "FOLDER", "default_weight": "1"}, ["default_weight", "'1'"]),
        ({"value_model": "FOLDER", "default_weight": True}, ["default_weight", "True"]),
        ({"value_model": "FOLDER", "default_weight": math.nan}, ["default_weight", "nan", "finite"]),
        ({"value_model": "FOLDER", "default_weight": 11}, ["default_weight", "11", "max_weight"]),
        ({"value_model": "FOLDER", "max_weight": 0}, ["max_weight", "0"]),
        ({"value_model": "FOLDER", "max_weight": math.inf}, ["max_weight", "inf"]),
    ],
)
def test_bad_settings(config, names, folder):
    def fill(value):
        if isinstance(value, dict):
            return {k: fill(v) for k, v in value.items()}
        return folder if value == "FOLDER" else value

    with pytest.raises(ValueError, match="^ivl: ") as error:
        parse_settings(fill(config), {})
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize("text", ["much", "nan", "inf"])
def test_bad_environment(folder, text):
    with pytest.raises(ValueError, match="IVL_DEFAULT_WEIGHT is"):
        parse_settings({"value_model": folder}, {"IVL_DEFAULT_WEIGHT": text})


def test_engine_args(folder):
    assert ivl_vllm.engine_args(value_model=folder, default_weight=0.0) == {
        "logits_processors": ["ivl"],
        "additional_config": {"ivl": {"value_model": folder, "default_weight": 0.0}},
    }
    with pytest.raises(ValueError, match="no such folder"):
        ivl_vllm.engine_args(value_model="./none")


NUMPYS = [
    np.float64(0.5),
    np.float32(0.5),
    np.int64(1),
    {"math": np.float64(0.5)},
    {np.str_("math"): 1},
    np.str_("0.5"),
]


@pytest.mark.parametrize("ivl", [*NUMPYS, True, 1, "auto:math", {"math": 1.0}], ids=repr)
def test_every_admitted_wish_can_be_sent_to_an_engine(monkeypatch, ivl):
    """vLLM's encoder takes Python's own types alone, and a request that it fails on is never taken off the list."""
    from vllm import SamplingParams
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    monkeypatch.setattr(admission, "_engines", [(PAIR, lambda: PAIR)])
    given = {"ivl": ivl, "other": "stays"}
    params = SamplingParams(extra_args=given)
    ivl_vllm.IVLLogitsProcessor.validate_params(params)
    sent = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params)).extra_args
    assert sent == given and PAIR.steering(sent) == PAIR.steering(given)
    assert given["ivl"] is ivl  # the caller's own stays as it is
    if not any(ivl is one for one in NUMPYS):
        assert params.extra_args is given  # which may be changed between two calls

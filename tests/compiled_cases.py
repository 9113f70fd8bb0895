"""Engines whose models vLLM compiles; `test_parity_compiled.py` runs each test in a process of its own."""

import weakref

from cascade_models import mark_scheme
from parity import Reference, assert_parity, engine, random_requests, run
from sibling_models import make_sibling, value_rows
from tiny import make_model
from vocab_map_models import make_other, random_map

import ivl_vllm


def test_torch_compile(models, tmp_path, monkeypatch):
    """Base and value networks are each compiled, under tags of their own."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    from vllm.compilation.counter import compilation_counter

    cascade = mark_scheme(make_model(tmp_path / "cascade", seed=14, layers=1), "cascade")
    sibling = make_sibling(models["value"], tmp_path / "sibling", seed=15)
    values = {"a": {"model": str(models["value"])}, "b": {"model": str(cascade)}}
    values["c"] = {"model": str(sibling), "minus": str(models["value"])}
    with (
        compilation_counter.expect(num_models_seen=4),
        engine(models["base"], **ivl_vllm.engine_args(values=values), enforce_eager=False) as llm,
    ):
        assert value_rows(llm).groups == [(0, 2), (1,)]
        layers = [weakref.ref(m) for n in value_rows(llm).networks for m in n.model.modules() if hasattr(m, "kv_cache")]
        requests = random_requests(24, seed=41, names=("a", "b", "c"), last_arrival=10)
        outputs = run(llm, requests)
    # Each of them would keep the whole KV cache, whose parts are views of one tensor.
    assert layers and not any(layer() for layer in layers)
    folders = {"a": models["value"], "b": cascade, "c": (sibling, models["value"])}
    assert_parity(Reference(models["base"], {"b": "cascade"}, **folders), requests, outputs)


def test_one_folder_twice_compiled(models, tmp_path, monkeypatch):
    """Compiled code is kept under a key: two networks of one folder are not each other's, nor is a map made anew."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    other = make_other(tmp_path / "value")
    maps = {
        "one": random_map(models["base"], other, 1, pieces_at_most=1),
        "mean": random_map(models["base"], other, 2),
    }
    values = {name: {"model": str(other), "vocab_map": str(tmp_path / f"{name}.safetensors")} for name in maps}
    for made in (maps, {"one": maps["mean"], "mean": maps["one"]}):
        for name, vocab_map in made.items():
            vocab_map.save(tmp_path / f"{name}.safetensors")
        with engine(models["base"], **ivl_vllm.engine_args(values=values), enforce_eager=False) as llm:
            requests = random_requests(12, seed=63, names=("one", "mean"), last_arrival=10)
            outputs = run(llm, requests)
        assert_parity(Reference(models["base"], maps=made, one=other, mean=other), requests, outputs)

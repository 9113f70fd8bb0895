"""The hook through which vLLM finds `ivl`: entry point `ivl` of the group `vllm.general_plugins`.

vLLM calls `register` in every process. It registers the model loader `ivl` and wraps four methods:
`EngineArgs.create_engine_config`, so that engine arguments that name the processor `ivl` become a configuration that
vLLM understands; `SamplingParams.from_optional`, so that a streamed HTTP request is checked before its answer begins;
`EngineCore.preprocess_add_request`, so that requests which use different value networks share no cached prefix;
`EngineCore.sleep`, so that no value network loses its weights. Where value networks are loaded, `steps.watch_steps`
wraps two methods of `Worker` besides.
Engines that do not name `ivl` are left as they are.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ivl_vllm.settings import parse_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

ALIAS = "ivl"
PROCESSOR = "ivl_vllm:IVLLogitsProcessor"
LOAD_FORMAT = "ivl"
UNASKED_FORMATS = ("dummy", "sharded_state", "runai_streamer_sharded")
# Kept apart from the settings, which only the user writes: what the user had set where the plugin put its own, and
# what tells sets of value networks apart.
ENGINE_KEY = "ivl_engine"


def register() -> None:
    """Makes vLLM know `ivl`. Safe to call more than once in a process."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import register_model_loader

    create = EngineArgs.create_engine_config
    if getattr(create, "ivl", False):
        return
    from ivl_vllm.serving.loader import IVLModelLoader

    register_model_loader(LOAD_FORMAT)(IVLModelLoader)

    @functools.wraps(create)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        replaced = _resolve(self)
        original = {name: getattr(self, name) for name in replaced}
        for name, value in replaced.items():
            setattr(self, name, value)
        try:
            vllm_config = create(self, *args, **kwargs)
        finally:
            # The user's arguments stay as they were: vLLM may make a second configuration from them.
            for name, value in original.items():
                setattr(self, name, value)
        if replaced:
            from ivl_vllm.serving.checks import check_engine

            if "load_format" not in replaced and vllm_config.load_config.load_format == self.load_format:
                vllm_config.load_config.load_format = LOAD_FORMAT
            check_engine(vllm_config, hybrid_is_users_choice=self.disable_hybrid_kv_cache_manager is not None)
        return vllm_config

    create_engine_config.ivl = True
    EngineArgs.create_engine_config = create_engine_config
    _check_requests_early()
    _refuse_deep_sleep()
    from ivl_vllm.serving.steps import mark_requests

    mark_requests()


def _check_requests_early() -> None:
    """Has every HTTP request checked where its sampling parameters are made.

    vLLM's own check (`validate_params` of the processor) runs when the first token is asked for. A streamed answer has
    said 200 by then and could only carry the error as an event.
    """
    from vllm import SamplingParams

    from ivl_vllm.serving import admission

    make = SamplingParams.from_optional

    @functools.wraps(make)
    def from_optional(*args: Any, **kwargs: Any) -> SamplingParams:
        params = make(*args, **kwargs)
        admission.check_request(params.extra_args)
        return params

    SamplingParams.from_optional = staticmethod(from_optional)


def _refuse_deep_sleep() -> None:
    """Has engines refuse sleep that discards weights before anything stops: vLLM reloads those of the base alone."""
    from vllm.v1.engine.core import EngineCore

    fall_asleep = EngineCore.sleep

    @functools.wraps(fall_asleep)
    def sleep(self: EngineCore, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        settings = self.vllm_config.additional_config  # of other plugins it may be an object of their own
        if level > 1 and isinstance(settings, dict) and ENGINE_KEY in settings:
            raise ValueError(
                f"ivl: sleep level is {level}, which discards all weights, and vLLM reloads those of the base alone: "
                "use level 1"
            )
        return fall_asleep(self, level, *args, **kwargs)

    EngineCore.sleep = sleep


def _is_ours(processor: Any) -> bool:
    if isinstance(processor, type):
        return f"{processor.__module__}:{processor.__qualname__}" == "ivl_vllm.serving.processor:IVLLogitsProcessor"
    return processor in (ALIAS, PROCESSOR, "ivl_vllm.serving.processor:IVLLogitsProcessor")


def _resolve(args: EngineArgs) -> dict[str, Any]:
    """The engine arguments that change because `ivl` is on; nothing when it is off.

    Raises:
        ValueError: settings without the processor, or wrong settings.
    """
    given = args.logits_processors or ()
    # Harnesses pass plain strings on: list() would make letters of one.
    processors = [given] if isinstance(given, str) else list(given)
    additional = dict(args.additional_config or {})
    if not any(map(_is_ours, processors)):
        if ALIAS in additional:
            raise ValueError(
                f'ivl: additional_config["ivl"] is {additional[ALIAS]!r} but the logits processor is off '
                f"(logits_processors={args.logits_processors!r}): "
                'add --logits-processor ivl (offline: logits_processors=["ivl"]) or remove the settings'
            )
        return {}
    if args.load_format == "tensorizer" or "://" in str(args.model):
        raise ValueError(
            f"ivl: a base model with load_format={args.load_format!r} from {args.model!r} is streamed in a way that "
            "leaves no room for value networks: copy it to a folder and load it from there"
        )
    # Named twice, it would add the value logits twice.
    first, others = list(map(_is_ours, processors)).index(True), [p for p in processors if not _is_ours(p)]
    resolved = [*others[:first], PROCESSOR, *others[first:]]
    for key in additional if ALIAS not in additional else ():
        if key == "value_model" or str(key).lower() == ALIAS:
            raise ValueError(
                f"ivl: additional_config has {key!r} = {additional[key]!r}, which nobody reads: put the settings under "
                '"ivl", as in {"ivl": {"value_model": "FOLDER"}}'
            )
    settings = parse_settings(additional.get(ALIAS))
    additional[ALIAS] = settings.to_dict()
    additional[ENGINE_KEY] = {
        "load_format": str(args.load_format),
        "dtype": str(args.dtype).removeprefix("torch."),
        "kv_cache_dtype": args.kv_cache_dtype,
    }
    replaced = {"logits_processors": resolved, "additional_config": additional}
    # Of these vLLM does not ask a checkpoint whether its embeddings are tied; they become ours after that.
    return replaced if args.load_format in UNASKED_FORMATS else replaced | {"load_format": LOAD_FORMAT}

"""Loading the frozen base, the value network and their tokenizer, with every mismatch told before training starts."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ivl_vllm.hub import HUB_ID, ask_hub, find_folder, first_line
from ivl_vllm.tokenizer import read_tokenizer_of
from ivl_vllm.vocab.fingerprint import vocabulary_fingerprint


def locate_model(name: str, flag: str) -> str:
    """Check that `name` can be a model before anything is loaded.

    Args:
        name: A folder or a hub id.
        flag: The flag it came from, for the message.

    Returns:
        The folder's absolute path, or the hub id as it is.

    Raises:
        ValueError: No such folder, a folder without `config.json`, or a hub id that the hub does not give out.
    """
    try:
        path = find_folder(name)
    except ValueError as error:
        raise ValueError(f"{flag} {name}: {error}") from error
    if path:
        if not (path / "config.json").is_file():
            hint = " (a LoRA adapter: merge it first)" if (path / "adapter_config.json").is_file() else ""
            raise ValueError(f"{flag} {name}: the folder has no config.json, so it is no model{hint}")
        return str(path.resolve())
    try:
        ask_hub(name)
    except ValueError as error:
        raise ValueError(f"{flag} {name}: {error}") from error
    return name


def _load(loader: Any, name: str, flag: str, **kwargs: Any) -> Any:
    try:
        return loader.from_pretrained(name, **kwargs)
    # The second for an attention that is not installed, the third for a file that is cut short, or a pointer to one.
    except (OSError, ImportError, SafetensorError) as error:
        raise ValueError(f"{flag} {name}: cannot be loaded: {first_line(error)}") from error
    except ValueError as error:
        if not str(error).startswith("Unrecognized configuration class"):
            raise
        kind = _load(AutoConfig, name, flag, trust_remote_code=kwargs.get("trust_remote_code", False)).model_type
        raise ValueError(
            f"{flag} {name}: transformers has no causal language model of the type {kind!r}; choose a text model of "
            "its family (where that has the same vocabulary, what is trained beside it steers this one too)"
        ) from error


def load_tokenizer(name: str, flag: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        ValueError: There is none, or it has no end-of-text token, without which no answer learns to stop.
    """
    tokenizer = read_tokenizer_of(name, flag, trust_remote_code)
    if tokenizer.eos_token is None:
        raise ValueError(f"{flag} {name}: its tokenizer has no end-of-text token (eos_token), so answers cannot stop")
    return tokenizer


def read_chat_template(name: str, trust_remote_code: bool = False) -> str:
    """The template of `--chat_template_path`: the text of a file, or a tokenizer's, of which nothing else is taken.

    Raises:
        ValueError: There is no such file or tokenizer, or it has no template.
    """
    flag, path = "--chat_template_path", Path(os.path.expanduser(name))
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{flag} {name}: not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    if not path.is_dir() and (path.suffix in (".jinja", ".j2") or not HUB_ID.fullmatch(name)):
        raise ValueError(f"{flag} {name}: no such file; give a .jinja file, or a tokenizer's folder or hub id")
    tokenizer = read_tokenizer_of(str(path) if path.is_dir() else name, flag, trust_remote_code)
    if tokenizer.chat_template is None:
        raise ValueError(f"{flag} {name}: that tokenizer has no chat template; give one that has, or a .jinja file")
    return tokenizer.get_chat_template()


def check_same_vocabulary(
    base: PreTrainedTokenizerBase, base_name: str, other: PreTrainedTokenizerBase, name: str, flag: str
) -> None:
    """Two models must give the same ids to the same tokens.

    Args:
        base: Tokenizer of the base.
        base_name: What was given to --base.
        other: Tokenizer of a model beside it: a further base, or what the value network starts from.
        name: What to call that model.
        flag: The flag that it came from.

    Raises:
        ValueError: They do not; the message names both, their sizes and an example.
    """
    if vocabulary_fingerprint(base) == vocabulary_fingerprint(other):
        return
    base_vocab, other_vocab = base.get_vocab(), other.get_vocab()
    differing = sorted(set(base_vocab.items()) ^ set(other_vocab.items()), key=lambda pair: pair[1])
    token = differing[0][0]
    raise ValueError(
        f"--base {base_name} and {flag} {name} have different vocabularies ({len(base_vocab)} and "
        f"{len(other_vocab)} tokens; {token!r} is {base_vocab.get(token, 'absent')} and "
        f"{other_vocab.get(token, 'absent')}): choose {flag} from the base's family"
    )


def check_padding(token: str | None, tokenizer: PreTrainedTokenizerBase, columns: int, where: str) -> None:
    """Refuse a padding token that a network has no embedding for.

    Args:
        token: What pads; None for the end of the text.
        tokenizer: Its tokenizer.
        columns: Tokens that all networks have.
        where: Whose tokenizer it is, for the message.

    Raises:
        ValueError: Its id is beyond them.
    """
    index = None if token is None else tokenizer.convert_tokens_to_ids(token)
    if index is not None and index >= columns:
        raise ValueError(
            f"{where}: its tokenizer pads with {token!r}, whose id {index} is beyond a network's {columns} tokens: "
            f"give one that is not, --pad_token '{tokenizer.eos_token}'"
        )


def load_base(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """The base as it lies on disk: its own dtype, eval mode, no gradients.

    Args:
        name: A folder or a hub id.
        options: `trust_remote_code` and perhaps `attn_implementation`, for transformers' loaders.
    """
    model = _load(AutoModelForCausalLM, name, "--base", dtype="auto", **options)
    return model.requires_grad_(False).eval()


def load_value(
    name: str, flag: str, zero_output_layer: bool, options: dict[str, Any]
) -> tuple[PreTrainedModel, torch.dtype]:
    """The value network in fp32 (mixed precision keeps fp32 master weights) and the dtype that it has on disk.

    Args:
        name: Model to start from.
        flag: The flag it came from, for messages.
        zero_output_layer: Untie the output layer and set it to zero, so that V(x) = 0 at the start.
        options: For the loaders, see `load_base`.

    Raises:
        ValueError: It cannot be loaded, or has no output layer to zero.
    """
    config = _load(AutoConfig, name, flag, trust_remote_code=options["trust_remote_code"])
    stored = config.get_text_config().dtype or torch.float32
    if zero_output_layer:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    model = _load(AutoModelForCausalLM, name, flag, config=config, dtype=torch.float32, **options)
    _mend_generation_config(model)
    if zero_output_layer:
        _zero_output_layer(model, f"{flag} {name}")
    return _train_text(model), stored


def _train_text(model: PreTrainedModel) -> PreTrainedModel:
    """Let all be trained but the other senses of a multimodal model, which text never reaches.

    DDP with gradient checkpointing ends at a weight that is to be trained and gets no gradient.
    """
    model.requires_grad_(True)
    if model.config.get_text_config() is not model.config:
        model.requires_grad_(False)
        for part in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()):
            if part is not None:
                part.requires_grad_(True)
    return model


def build_value(
    path: str, base: PreTrainedModel, seed: int, zero_output_layer: bool, options: dict[str, Any]
) -> tuple[PreTrainedModel, torch.dtype]:
    """A value network from scratch, in fp32, and the dtype that it is saved in.

    Args:
        path: A `config.json`, or the folder that holds one. Where it gives no `vocab_size`, it gets the base's.
        base: The frozen base.
        seed: Seed of the weights.
        zero_output_layer: As in `load_value`.
        options: As in `load_base`; a model without weights takes no code from the hub.

    Raises:
        ValueError: No such file, no causal LM's config, or a value in it that its class refuses.
    """
    file = Path(os.path.expanduser(path))
    file = file / "config.json" if file.is_dir() else file
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"--init_config {path}: {error.strerror or error}; give a config.json, or the folder that holds one"
        ) from error
    except ValueError as error:
        raise ValueError(f"--init_config {path}: no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ValueError(f"--init_config {path}: no model_type, so this is no model's config.json")
    if "text_config" not in content:
        content.setdefault("vocab_size", base.config.get_text_config().vocab_size)
    if zero_output_layer:
        content["tie_word_embeddings"] = False
    try:
        config = AutoConfig.for_model(**content)
        set_seed(seed)
        attention = {name: value for name, value in options.items() if name == "attn_implementation"}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"--init_config {path}: no causal LM can be built from it: {first_line(error)}") from error
    if zero_output_layer:
        _zero_output_layer(model, f"--init_config {path}")
    stored = content.get("dtype", content.get("torch_dtype")) or "float32"
    return _train_text(model), getattr(torch, str(stored), torch.float32)


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Some published models say temperature and top_p but not `do_sample`; transformers would not save the result."""
    config = getattr(model, "generation_config", None)
    if config is None:  # a model of somebody's own code that cannot generate
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
    try:
        config.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig.from_model_config(model.config)


def _zero_output_layer(model: PreTrainedModel, where: str) -> None:
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{where}: no output layer was found to zero")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()

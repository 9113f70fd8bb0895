"""The command line `ivl`. Each command imports what it needs when it runs, so that help is quick."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from ivl_vllm.training.ivl_config import own_version
from ivl_vllm.vocab.command import add_arguments

_TRAIN_DESCRIPTION = """\
Train a value network V beside a frozen base B0 so that softmax(B0 + V) fits demonstrations.

  ivl train --base BASE --init SMALL --data demonstrations.jsonl --output my-value

--config FILE reads the same names from a YAML file; flags win over it. Every other field of TRL's SFTConfig (and so of
transformers' TrainingArguments) is a flag too, under its own name: ivl train --help-all lists them. Several processes:
torchrun --nproc_per_node N -m ivl_vllm.cli train ..."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ivl`.

    Args:
        argv: Words of the command line without the program's name; left out, those of the process.

    Returns:
        The exit status: 0; 2 for input that the user can mend and 1 for training that diverged, each told in one line
        on stderr.
    """
    # Before any command imports the hub's client, which reads it once.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    parser = argparse.ArgumentParser(
        prog="ivl",
        description="Inverse Value Learning: train small value networks, serve them beside big bases in vLLM.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {own_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("train", help="train a value network (ivl train --help)", add_help=False)
    map_vocab = commands.add_parser("map-vocab", help="tie a value network's vocabulary to another base's")
    add_arguments(map_vocab)
    inspect = commands.add_parser("inspect", help="tell what a value network's folder holds and how to serve it")
    inspect.add_argument("folder", metavar="FOLDER", help="folder of a value network or of any causal LM")
    trace = commands.add_parser("trace", help="draw a trace: generated text, coloured by how far it was steered")
    trace.add_argument("file", metavar="FILE", type=os.path.expanduser, help="trace_file of an engine (JSON lines)")
    trace.add_argument("--tokenizer", required=True, metavar="BASE", help="folder or hub id of the base")
    trace.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the tokenizer")
    trace.add_argument("--name", nargs="+", metavar="NAME", help="traces to draw (default: all in the file)")
    trace.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        type=os.path.expanduser,
        help="picture to write: OUT.html or OUT.png",
    )
    words = list(sys.argv[1:] if argv is None else argv)
    # Split off first: argparse would take the flags of `train` for its own.
    known, rest = (words[:1], words[1:]) if words[:1] == ["train"] else (words, [])
    arguments = parser.parse_args(known)
    try:
        if arguments.command == "train":
            return _train(rest)
        with _user_errors():
            {"map-vocab": _map_vocab, "trace": _trace, "inspect": _inspect}[arguments.command](arguments)
        return 0
    except _InputError as error:
        print(f"ivl {arguments.command}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2


class _InputError(Exception):
    """An error that speaks to the user; one from inside a training step keeps its traceback."""


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise _InputError(error) from error
    except OSError as error:
        if error.filename is None:  # no file's fault: a pipe that was closed, a library that does not load
            raise
        raise _InputError(error) from error


def _train(words: list[str]) -> int:
    if "--help" in words or "-h" in words:
        _train_help()
        return 0
    if "--help-all" in words or "--help_all" in words:
        _train_help(everything=True)
        return 0
    from ivl_vllm.training.command import prepare
    from ivl_vllm.training.divergence import TrainingDivergedError

    try:
        with _user_errors():
            run = prepare(words)
    except _InputError:
        _leave_processes()
        raise
    status = 0
    try:
        run.run()
    except TrainingDivergedError as error:
        print(f"ivl train: error: {error}", file=sys.stderr)
        status = 1
    except (ImportError, TypeError, ValueError) as error:
        if run.trainer.has_begun:
            raise
        # transformers makes optimizer and scheduler there: a missing package, or arguments that they do not take.
        resumed = ", or at what --resume names" if run.trainer.args.resume_from_checkpoint else ""
        print(
            f"ivl train: error: nothing was trained: {' '.join(str(error).split())}; look at --optim, --optim_args, "
            f"--lr_scheduler_type and --lr_scheduler_kwargs, which decide what is made before the first step{resumed}",
            file=sys.stderr,
        )
        status = 2
    _leave_processes()
    return status


def _leave_processes() -> None:
    """Part from the other processes in order: left to the interpreter's end, gloo aborts one of them now and then."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _train_help(everything: bool = False) -> None:
    from transformers.hf_argparser import HfArgumentParser

    from ivl_vllm.training.arguments import CommonArguments, ValueArguments

    trainer_arguments = CommonArguments
    if everything:
        from ivl_vllm.training.trainer import TrainerArguments as trainer_arguments

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the description's lines and tells defaults."""

    HfArgumentParser(
        (ValueArguments, trainer_arguments),
        prog="ivl train",
        usage="ivl train --base BASE --data FILE --output FOLDER [--config FILE] [FLAGS]",
        description=_TRAIN_DESCRIPTION,
        formatter_class=Formatter,
    ).print_help()


def _map_vocab(arguments: argparse.Namespace) -> None:
    from ivl_vllm.vocab.command import run

    run(arguments)


def _trace(arguments: argparse.Namespace) -> None:
    from ivl_vllm.trace_view import draw

    draw(arguments.file, arguments.tokenizer, arguments.name, arguments.output, arguments.trust_remote_code)
    print(f"wrote {arguments.output}")


def _inspect(arguments: argparse.Namespace) -> None:
    from ivl_vllm.training.inspect_folder import describe

    print(describe(arguments.folder))


if __name__ == "__main__":
    sys.exit(main())

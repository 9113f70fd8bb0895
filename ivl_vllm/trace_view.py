"""`ivl trace`: a trace as a picture, the generated text coloured by how far each token was steered."""

from __future__ import annotations

import html
import math
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ivl_vllm.trace_file import Token, read_trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = 90
MOST_PARTS = 8  # tokens that one character may be cut into, and to spare
MOST_TOKENS, MOST_ROWS = 10_000, 1_500  # of a PNG: some ten seconds, and the height that every matplotlib can draw
RED, GREY = (214, 69, 65), (128, 128, 128)


def draw(path: str, tokenizer: str, names: Sequence[str] | None, output: str, trust_remote_code: bool = False) -> None:
    """Draws traces into one HTML or PNG file.

    Args:
        path: the trace file.
        tokenizer: folder or hub id of the base.
        names: traces to draw; one that several requests had in common stands for all of them. None for all.
        output: where to; its ending says what.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Raises:
        ValueError: a file that cannot be read or written, an unknown name or ending, no tokenizer or one that lacks the
            tokens, too much for a PNG.
    """
    from ivl_vllm.tokenizer import read_tokenizer

    ending = Path(output).suffix
    if ending not in (".html", ".png"):
        raise ValueError(f"--output is {output!r}: end it in .html or .png")
    traces = read_trace(path)
    chosen = traces if names is None else {}
    for name in names or ():
        found = {name} if name in traces else {t for t in traces if re.fullmatch(rf"{re.escape(name)} \d+", t)}
        if not found:
            raise ValueError(f"--name is {name!r}, but {path} has {', '.join(traces) or 'no trace'}")
        chosen |= {each: tokens for each, tokens in traces.items() if each in found}
    if not any(chosen.values()):
        raise ValueError(f"{path} has no trace: ask for one with a request's ;trace=NAME")
    count = sum(map(len, chosen.values()))
    if ending == ".png" and count > MOST_TOKENS:
        raise _too_much(output, f"{count} tokens", MOST_TOKENS)
    try:
        decoder = read_tokenizer(tokenizer, trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer is {tokenizer!r}: there is no tokenizer to load ({error})") from error
    try:
        drawn = {name: _pieces(tokens, decoder) for name, tokens in chosen.items()}
    except (IndexError, TypeError) as error:  # tokenizers in Python; those in Rust know no text for such a token
        raise ValueError(f"--tokenizer is {tokenizer!r}: not that of {path}, it lacks a token ({error})") from error
    pieces = [piece for each in drawn.values() for piece in each]
    # What only the engine computed shall not pale the answer.
    answer = (piece for piece in pieces if not piece.is_behind)
    full = _largest(answer) or _largest(pieces) or 1.0
    legend = [f"red: KL from the base, full at {full:.2g} nats; underlined: not the base's own choice"]
    if any(piece.is_behind for piece in pieces):
        legend.append("grey: behind the first end token, perhaps no part of the answer; the darker the larger the KL")
    strange = sum(not math.isfinite(token.kl) for tokens in chosen.values() for token in tokens)
    if strange:
        legend.append(f"not finite: the KL of {strange} of the tokens, which give no colour")
    try:
        (_write_html if ending == ".html" else _write_png)(drawn, legend, full, Path(output))
    except OSError as error:
        raise ValueError(f"--output is {output!r}: cannot be written ({error.strerror})") from error


def _too_much(output: str | Path, count: str, most: int) -> ValueError:
    return ValueError(
        f"--output is {str(output)!r}, but {count} are too many for a PNG (at most {most}): choose one request with "
        "--name, or write .html"
    )


def _largest(found: Iterable[Token | _Piece]) -> float:
    """The largest KL that is finite, 0 if there is none above."""
    return max((each.kl for each in found if math.isfinite(each.kl) and each.kl > 0), default=0.0)


class _Piece(NamedTuple):
    """Text that is coloured as one: a token's, or that of several which only together are a character.

    Attributes:
        text: what is shown.
        kl: the largest finite one of its tokens in nats, at least 0.
        is_other: whether the base would have chosen otherwise at one of them.
        is_behind: whether an end token came before. An engine traces a token or more before it knows of the end, and a
            request with `ignore_eos` goes on; the file does not say which.
        title: of each token a line with its weights, its KL and the base's choice.
    """

    text: str
    kl: float
    is_other: bool
    is_behind: bool
    title: str

    def colour(self, full: float) -> tuple[tuple[int, int, int], float]:
        """Of the background: red, green, blue of 0..255 and how opaque, 0..1."""
        share = min(self.kl / full, 1.0)
        return (GREY, 0.2 + 0.6 * share) if self.is_behind else (RED, share)


def _pieces(tokens: Sequence[Token], decoder: PreTrainedTokenizerBase) -> list[_Piece]:
    """A trace's tokens by what can be seen of them: those without text go with the next one that has some."""
    groups: list[tuple[str, list[Token]]] = []
    waiting: list[Token] = []
    for token, text in zip(tokens, texts(tokens, decoder), strict=True):
        waiting.append(token)
        if text:
            groups.append((text, waiting))
            waiting = []
    if waiting:
        groups.append((" ", waiting))
    pieces, is_behind = [], False
    for text, group in groups:
        is_other = any(token.token != token.base_token for token in group)
        title = "\n".join(_told(token, decoder) for token in group)
        pieces.append(_Piece(text, _largest(group), is_other, is_behind, title))
        is_behind |= any(token.token == decoder.eos_token_id for token in group)
    return pieces


def texts(tokens: Sequence[Token], decoder: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text; of tokens that share a character, the last one has it.

    A token alone may be half a character, and many tokenizers drop the space in front of what they decode.
    """
    ids = [token.token for token in tokens]
    found, start, shown = [], 0, 0  # decoded from `start` on; `shown` tokens have been told
    for end in range(1, len(ids) + 1):
        before, now = decoder.decode(ids[start:shown]), decoder.decode(ids[start:end])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids) and end - shown < MOST_PARTS:
            found.append("")
            continue
        found.append(now[len(before) :])
        start, shown = shown, end
    return found


def _told(token: Token, decoder: PreTrainedTokenizerBase) -> str:
    weights = ", ".join(f"{name} {_number(weight)}" for name, weight in token.weights.items()) or "unsteered"
    return f"{weights}; {_number(token.kl)} nats; the base: {decoder.decode([token.base_token])!r}"


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else f"not finite ({value})"


def _write_html(traces: dict[str, list[_Piece]], legend: list[str], full: float, output: Path) -> None:
    parts = [
        '<!doctype html><meta charset="utf-8"><title>ivl trace</title>',
        "<style>body{font:16px/1.7 monospace;margin:2em;max-width:70em}p{white-space:pre-wrap}</style>",
        f"<p>{html.escape('; '.join(legend))}; hover for the weights</p>",
    ]
    for name, pieces in traces.items():
        parts.append(f"<h3>{html.escape(name)}</h3><p>")
        for piece in pieces:
            (red, green, blue), alpha = piece.colour(full)
            style = f"background:rgba({red},{green},{blue},{alpha:.3f})"
            if piece.is_other:
                style += ";text-decoration:underline"
            text = html.escape(piece.text).replace("\n", "⏎\n")  # alone, the end of a line has no colour
            parts.append(f'<span style="{style}" title="{html.escape(piece.title)}">{text}</span>')
        parts.append("</p>")
    output.write_text("".join(parts), encoding="utf-8")


def _write_png(traces: dict[str, list[_Piece]], legend: list[str], full: float, output: Path) -> None:
    try:
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a PNG needs matplotlib: pip install 'ivl-vllm[train]', or write .html") from error

    rows: list[list[tuple[int, str, _Piece | None]]] = []
    for name, pieces in traces.items():
        rows += [[(0, name, None)], []]
        column = 0
        for piece in pieces:
            text = piece.text.replace("\n", "⏎").replace("\t", "⇥")
            if column + len(text) > COLUMNS and column:
                rows.append([])
                column = 0
            rows[-1].append((column, text, piece))
            column += len(text)
    if len(rows) > MOST_ROWS:
        raise _too_much(output, f"{len(rows)} lines of text", MOST_ROWS)
    shown = {character for row in rows for _, text, _ in row for character in text}
    with warnings.catch_warnings():
        # Said below, once and not for every character.
        warnings.filterwarnings("ignore", r"Glyph \d|Matplotlib currently does not support")
        figure = Figure(figsize=(COLUMNS * 0.1 + 0.5, len(rows) * 0.28 + 0.8))
        axes = figure.subplots()
        axes.set(xlim=(0, COLUMNS), ylim=(len(rows), -1))
        axes.axis("off")
        axes.set_title("\n".join(legend), fontsize=8, loc="left")
        boxes, colours, lines = [], [], []
        for y, row in enumerate(rows):
            for x, text, piece in row:
                weight = "bold" if piece is None else "normal"
                axes.text(x, y, text, weight=weight, family="monospace", fontsize=10, va="center", parse_math=False)
                if piece is None:
                    continue
                end, (colour, alpha) = x + len(text), piece.colour(full)
                boxes.append([(x, y - 0.45), (end, y - 0.45), (end, y + 0.45), (x, y + 0.45)])
                colours.append((*(part / 255 for part in colour), alpha))
                if piece.is_other:
                    lines.append((y + 0.4, x, end))
        axes.add_collection(PolyCollection(boxes, facecolors=colours, linewidths=0))
        if lines:
            axes.hlines(*zip(*lines, strict=True), color="black", lw=0.8)
        figure.savefig(output, dpi=150, bbox_inches="tight")
    hard = shown - _drawable(shown)
    if hard:
        print(
            f"warning: {output}: characters such as {min(hard)!r} ({len(hard)} in all) run from right to left or are "
            f"not in matplotlib's font: the PNG shows them wrong, -o {output.with_suffix('.html')} right",
            file=sys.stderr,
            flush=True,
        )


def _drawable(characters: set[str]) -> set[str]:
    """Those of the characters that matplotlib has in a monospaced font and that run from left to right."""
    from matplotlib import font_manager, rcParams

    found = set()
    for family in rcParams["font.monospace"]:
        try:
            font = font_manager.findfont(family, fallback_to_default=False)
        except ValueError:  # not installed
            continue
        found |= font_manager.get_font(font).get_charmap().keys()
    return {c for c in characters if ord(c) in found and unicodedata.bidirectional(c) not in ("R", "AL")}

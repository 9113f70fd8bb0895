"""Traces made by hand, and what `ivl trace` draws of them."""

import json
import re

from ivl_vllm.cli import main


def line(position, token, before, name="a", request="r", draft=False, **other):
    fields = {
        "trace": name,
        "request": request,
        "position": position,
        "token_before": before,
        "draft": draft,
        "base_token": 1,
        "token": token,
        "weights": {"math": 1.0},
        "kl": 0.5,
    }
    return json.dumps(fields | other)


def lines_of(ids, kls, **other):
    """The lines of an answer at which the base would have chosen the same."""
    befores = [None, *ids]
    return [line(n, ids[n], befores[n], base_token=ids[n], kl=kls[n], **other) for n in range(len(ids))]


def drawn(tmp_path, tokenizer, lines, output="picture.html", words=()):
    """Exit code of `ivl trace`, and the HTML it wrote, if any."""
    path, picture = tmp_path / "trace.jsonl", tmp_path / output
    path.write_text("\n".join(lines) + "\n")
    code = main(["trace", str(path), "--tokenizer", str(tokenizer), "-o", str(picture), *words])
    return code, picture.read_text(encoding="utf-8") if picture.exists() and output.endswith("html") else ""


def spans(page):
    """Text, background, whether it is underlined, and title, of each visible span."""
    found = re.findall(r'<span style="background:([^;"]*)(;text-decoration:underline)?" title="([^"]*)">([^<]*)<', page)
    return [(text, colour, bool(line), title) for colour, line, title, text in found if text]


def pixels(picture):
    """The colours of a PNG, `[height, width, 3]` in 0..1."""
    from matplotlib.image import imread

    return imread(picture)[:, :, :3]

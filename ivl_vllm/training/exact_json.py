"""Numbers in JSON columns, which `datasets` rounds to ten decimals."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import datasets.arrow_writer
import datasets.features.features
import datasets.utils.json


@contextmanager
def exact_numbers() -> Iterator[None]:
    """Has `datasets` write and read columns of JSON by Python's own `json`, in this process and those it forks."""
    with ExitStack() as patches:
        for module in (datasets.utils.json, datasets.features.features, datasets.arrow_writer):
            for name, function in (("ujson_dumps", json.dumps), ("ujson_loads", json.loads)):
                if hasattr(module, name):
                    patches.enter_context(patch.object(module, name, function))
        yield

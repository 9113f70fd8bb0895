"""The cases that every backend of the kernels has to pass, against a float64 oracle.

`test_kernels_torch.py` runs them on the torch backend; `kernel_triton_cases.py` on the Triton backend, on a GPU where
there is one, else in Triton's interpreter.
"""

import itertools
from dataclasses import dataclass

import ivl_kernels
import pytest
import torch

INF, NAN = float("inf"), float("nan")
SENTINEL = 777.0
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_PAIRS = list(itertools.product(FLOATS, FLOATS))


@dataclass
class Case:
    """Arguments of one call; the value side is `value` for `value_add`, `hidden` and `matrix` for the other."""

    storage: torch.Tensor  # `logits` is a part of it; the rest must stay as it is
    logits: torch.Tensor
    weights: torch.Tensor
    row_index: torch.Tensor | None
    vocab_map: torch.Tensor | None
    value: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    matrix: torch.Tensor | None = None

    def run(self, backend: str) -> None:
        options = {"row_index": self.row_index, "vocab_map": self.vocab_map, "backend": backend}
        if self.value is not None:
            result = ivl_kernels.value_add(self.logits, self.value, self.weights, **options)
        else:
            result = ivl_kernels.lm_head_value_add(self.logits, self.hidden, self.matrix, self.weights, **options)
        assert result is self.logits


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_case(
    operation: str,
    n: int = 5,
    base_columns: int = 1000,
    value_columns: int | None = None,
    *,
    logits_dtype: torch.dtype = torch.float32,
    value_dtype: torch.dtype = torch.float32,
    map_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype | None = torch.int64,
    padding: int = 24,
    hidden: int = 64,
    seed: int = 0,
) -> Case:
    """Random arguments: rows in random order, some padded with -1, some with weight 0, weights of either sign."""
    generator = torch.Generator().manual_seed(seed)
    value_columns = base_columns if value_columns is None else value_columns
    rows = n + 3

    def normal(*shape, dtype=value_dtype):
        return torch.randn(*shape, generator=generator).to(dtype).to(device())

    storage = torch.full((rows + 2, base_columns + padding), SENTINEL, dtype=logits_dtype, device=device())
    logits = storage[1:-1, :base_columns]
    logits.copy_(3 * normal(rows, base_columns))
    weights = torch.randn(n, generator=generator).to(device())
    weights[3::7] = 0.0
    row_index = None
    if index_dtype is not None:
        row_index = torch.randperm(rows, generator=generator)[:n].to(index_dtype).to(device())
        row_index[4::5] = -1
    vocab_map = None
    if map_dtype is not None:
        vocab_map = torch.randint(-1, value_columns, (base_columns,), generator=generator).to(map_dtype).to(device())
        vocab_map[::5] = -1
    case = Case(storage, logits, weights, row_index, vocab_map)
    if operation == "value_add":
        case.value = normal(n, value_columns + 8)[:, :value_columns]
    else:
        case.hidden = normal(n, hidden + 16)[:, :hidden]
        case.matrix = normal(value_columns, hidden + 16)[:, :hidden]
    return case


def expected(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 oracle: what the storage has to hold, and how far a result may be from it."""
    result = case.storage.double().cpu()
    logits = result[1:-1, : case.logits.shape[1]]
    bound = torch.zeros_like(result)
    logits_bound = bound[1:-1, : case.logits.shape[1]]
    weights = case.weights.double().cpu()
    if case.value is not None:
        value = case.value.double().cpu()
        magnitude, terms = value.abs(), 1
    else:
        value = case.hidden.double().cpu() @ case.matrix.double().cpu().T
        magnitude = case.hidden.double().cpu().abs() @ case.matrix.double().cpu().abs().T
        terms = case.hidden.shape[1]
    columns = torch.arange(case.logits.shape[1])
    source = columns.where(columns < value.shape[1], -1) if case.vocab_map is None else case.vocab_map.long().cpu()
    for i, weight in enumerate(weights.tolist()):
        row = i if case.row_index is None else int(case.row_index[i])
        if row < 0 or row >= logits.shape[0] or weight == 0.0:
            continue
        steer = weight * value[i, source.clamp(min=0)]
        steer = steer.where((source >= 0) & torch.isfinite(steer.float()), 0.0)
        changed = source >= 0
        size = logits[row].abs() + abs(weight) * magnitude[i, source.clamp(min=0)]
        logits[row] += steer
        # Each of the float32 operations rounds by half a unit in the last place at most; then the logits' dtype, by one
        # unit, since Triton's interpreter cuts bfloat16 off.
        error = (terms + 2) * 2.0**-24 * size
        if case.logits.dtype != torch.float32:
            error += torch.finfo(case.logits.dtype).eps * logits[row].abs() + 1e-7
        logits_bound[row] = error.nan_to_num(0.0, 0.0, 0.0).where(changed, 0.0)
    return result, bound


def check(case: Case, backend: str) -> None:
    """Run a case; compare the whole storage: what lies outside the changed columns has to be equal."""
    want, bound = expected(case)
    case.run(backend)
    got = case.storage.double().cpu()
    assert torch.equal(got.isnan(), want.isnan())
    infinite = want.isinf()
    assert torch.equal(got[infinite], want[infinite])
    excess = ((got - want).abs() - bound)[want.isfinite()]
    assert excess.max() <= 0.0, f"off by {excess.max():.3g} more than rounding allows"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    integers = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    return tensor.clone(memory_format=torch.contiguous_format).view(integers)


class KernelCases:
    """Every test here runs for each backend; a subclass says which."""

    backend: str

    @pytest.mark.parametrize("map_dtype", [None, torch.int32, torch.int64], ids=["no-map", "map-int32", "map-int64"])
    @pytest.mark.parametrize(("logits_dtype", "value_dtype"), DTYPE_PAIRS)
    @pytest.mark.parametrize("operation", ["value_add", "lm_head"])
    def test_dtypes_and_maps(self, operation, logits_dtype, value_dtype, map_dtype):
        check(
            make_case(operation, logits_dtype=logits_dtype, value_dtype=value_dtype, map_dtype=map_dtype),
            self.backend,
        )

    @pytest.mark.parametrize("map_dtype", [None, torch.int32], ids=["no-map", "map"])
    @pytest.mark.parametrize(
        ("base_columns", "value_columns"),
        [(7, 7), (1, 1), (16, 16), (1000, 1000), (2048, 2048), (4097, 4097), (1000, 777), (777, 1000), (1024, 512)],
    )
    @pytest.mark.parametrize("operation", ["value_add", "lm_head"])
    def test_widths(self, operation, base_columns, value_columns, map_dtype):
        check(make_case(operation, 3, base_columns, value_columns, map_dtype=map_dtype), self.backend)

    @pytest.mark.parametrize("columns", [50257, 151936 + 5])
    def test_real_vocabularies_value_add(self, columns):
        check(
            make_case("value_add", 2, columns, value_dtype=torch.bfloat16, map_dtype=torch.int32, index_dtype=None),
            self.backend,
        )

    def test_real_vocabulary_lm_head(self):
        check(make_case("lm_head", 2, 50257, hidden=64, value_dtype=torch.bfloat16), self.backend)

    @pytest.mark.parametrize("n", [1, 16, 17, 33, 64, 65, 130])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_of_every_tile_size(self, n, dtype):
        check(make_case("lm_head", n, 300, value_dtype=dtype, map_dtype=torch.int32), self.backend)

    @pytest.mark.parametrize("n", [1, 70, 600])
    def test_many_rows_value_add(self, n):
        check(make_case("value_add", n, 130), self.backend)

    @pytest.mark.parametrize("hidden", [16, 40, 63, 200])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_hidden_size_not_a_multiple_of_the_step(self, hidden, dtype):
        check(make_case("lm_head", 4, 200, hidden=hidden, value_dtype=dtype), self.backend)

    @pytest.mark.parametrize("index_dtype", [None, torch.int32, torch.int64], ids=["no-index", "int32", "int64"])
    @pytest.mark.parametrize("padding", [0, 3, 16])
    @pytest.mark.parametrize("operation", ["value_add", "lm_head"])
    def test_row_index_and_strides(self, operation, index_dtype, padding):
        check(make_case(operation, 6, 333, index_dtype=index_dtype, padding=padding), self.backend)

    @pytest.mark.parametrize("logits_dtype", FLOATS)
    @pytest.mark.parametrize("operation", ["value_add", "lm_head"])
    def test_rows_in_order_with_gaps(self, operation, logits_dtype):
        case = make_case(operation, 7, 200, logits_dtype=logits_dtype, value_dtype=torch.float16)
        case.row_index = torch.tensor([0, 1, 2, 5, 6, 7, 9], device=device())
        check(case, self.backend)

    @pytest.mark.parametrize("operation", ["value_add", "lm_head"])
    def test_weights_in_half_precision(self, operation):
        case = make_case(operation)
        case.weights = case.weights.bfloat16()
        check(case, self.backend)

    @pytest.mark.parametrize("has_map", [False, True])
    @pytest.mark.parametrize("logits_dtype", FLOATS)
    @pytest.mark.parametrize("operation", ["value_add", "lm_head"])
    def test_minus_infinity_stays_for_weights_of_either_sign(self, operation, logits_dtype, has_map):
        map_dtype = torch.int32 if has_map else None
        case = make_case(operation, 4, 300, logits_dtype=logits_dtype, index_dtype=None, map_dtype=map_dtype)
        case.weights = torch.tensor([2.0, -2.0, 1e30, -1e30], device=device())
        case.logits[:, ::2] = -INF  # a grammar's mask
        case.logits[2] = -INF  # nothing allowed: a saturated row
        case.logits[:, 101] = INF
        before = case.logits.clone()
        if logits_dtype != torch.float16:  # 1e30 is not a number of float16
            check(case, self.backend)
        else:
            case.run(self.backend)
        assert torch.equal(case.logits[before == -INF], before[before == -INF])
        assert torch.equal(case.logits[before == INF], before[before == INF])

    @pytest.mark.parametrize("has_map", [False, True])
    def test_non_finite_value_logits_contribute_nothing(self, has_map):
        case = make_case("value_add", 5, 300, index_dtype=None, map_dtype=torch.int32 if has_map else None)
        case.weights = torch.tensor([1.0, -1.0, 2.0, 0.0, 1.0], device=device())
        case.value[0, 3:9] = NAN
        case.value[1, 4] = INF
        case.value[1, 5] = -INF
        case.value[2, :] = NAN
        case.value[3, :] = INF
        case.logits[:, 4] = -INF
        before = case.logits.clone()
        check(case, self.backend)
        assert torch.equal(case.logits[2:4], before[2:4])
        assert not case.logits.isnan().any()

    @pytest.mark.parametrize("weight", [NAN, INF, -INF])
    @pytest.mark.parametrize("operation", ["value_add", "lm_head"])
    def test_non_finite_weights_contribute_nothing(self, operation, weight):
        case = make_case(operation, index_dtype=None)
        case.weights[1] = weight
        before = case.logits[1].clone()
        check(case, self.backend)
        assert torch.equal(case.logits[1], before)

    @pytest.mark.parametrize("base", [0.0, -INF])
    def test_overflowing_product_contributes_nothing(self, base):
        case = make_case("value_add", 2, 40, index_dtype=None)
        case.value[0] = 3e38
        case.weights[0] = -10.0
        case.logits[0] = base
        case.run(self.backend)
        assert (case.logits[0] == base).all()

    def test_non_finite_hidden_and_matrix_stay_in_their_row_and_column(self):
        case = make_case("lm_head", 4, 300, index_dtype=None)
        case.weights[:] = 1.0
        case.hidden[1, 5] = NAN
        case.hidden[2, 6] = INF
        case.matrix[10, 7] = NAN
        case.matrix[11, 7] = -INF
        before = case.logits.clone()
        check(case, self.backend)
        assert torch.equal(case.logits[1:3], before[1:3])
        assert torch.equal(case.logits[:, 10:12], before[:, 10:12])
        assert (case.logits[0, 12:] != before[0, 12:]).all()

    @pytest.mark.parametrize("skip", ["weight", "minus-one", "past-the-end"])
    @pytest.mark.parametrize("operation", ["value_add", "lm_head"])
    def test_skipped_rows_keep_every_bit(self, operation, skip):
        case = make_case(operation, 40, 200)
        case.row_index = torch.arange(40, device=device()).flip(0)
        case.weights[:] = 1.5
        if skip == "weight":
            case.weights[1::2] = -0.0
        else:
            case.row_index[1::2] = -1 if skip == "minus-one" else 10**6
        case.logits[::3, 5] = NAN
        case.logits[::3, 6] = -0.0
        before = bits(case.storage)
        case.run(self.backend)
        changed = (bits(case.storage) != before).any(dim=1)
        # Value rows 0, 2, … belong to logits rows 39, 37, …, which begin at the storage's row 1.
        assert changed.nonzero().flatten().tolist() == list(range(2, 41, 2))

    @pytest.mark.parametrize("n", [3, 100])
    @pytest.mark.parametrize("operation", ["value_add", "lm_head"])
    def test_nothing_steered_changes_no_bit(self, operation, n):
        case = make_case(operation, n, 200)
        case.weights.zero_()
        before = bits(case.storage)
        case.run(self.backend)
        assert torch.equal(bits(case.storage), before)

    @pytest.mark.parametrize("operation", ["value_add", "lm_head"])
    def test_map_without_any_partner_changes_nothing(self, operation):
        case = make_case(operation, map_dtype=torch.int32)
        case.vocab_map.fill_(-1)
        check(case, self.backend)

    @pytest.mark.parametrize(("n", "columns", "value_columns"), [(0, 30, 30), (2, 0, 30), (2, 30, 0)])
    @pytest.mark.parametrize("operation", ["value_add", "lm_head"])
    def test_empty(self, operation, n, columns, value_columns):
        case = make_case(operation, n, columns, value_columns, map_dtype=None)
        before = bits(case.storage)
        case.run(self.backend)
        assert torch.equal(bits(case.storage), before)

    @pytest.mark.parametrize("operation", ["value_add", "lm_head"])
    def test_row_offsets_past_two_to_the_31(self, operation):
        # 32768 · 65536 = 2**31 numbers lie before the last row. Memory that is never touched is never handed out.
        case = make_case(operation, 2, 1000, logits_dtype=torch.bfloat16)
        stride, last = 65536, 32768
        huge = torch.empty(stride * last + 1000, dtype=torch.bfloat16, device=device())
        logits = huge.as_strided((last + 1, 1000), (stride, 1))
        source = case.logits[:2].clone()
        logits[last], logits[0] = source[0], source[1]
        case.row_index = torch.tensor([last, 0], dtype=torch.int32, device=device())
        small = case.logits[:2]
        case.logits = logits
        case.run(self.backend)
        got = torch.stack([logits[last], logits[0]])
        case.logits, case.row_index = small, torch.tensor([0, 1], device=device())
        small.copy_(source)
        case.run(self.backend)
        assert torch.equal(got, small)
        assert not torch.equal(got, source)

    @pytest.mark.parametrize("operation", ["value_add", "lm_head"])
    def test_each_row_is_independent_of_the_batch(self, operation):
        whole = make_case(operation, 20, 400, index_dtype=None)
        single = make_case(operation, 20, 400, index_dtype=None)
        poisoned = make_case(operation, 20, 400, index_dtype=None)
        other = poisoned.value if operation == "value_add" else poisoned.hidden
        other[5:] = NAN
        whole.run(self.backend)
        poisoned.run(self.backend)
        assert torch.equal(whole.logits[:5], poisoned.logits[:5])
        single.weights[:2] = 0
        single.weights[3:] = 0
        single.run(self.backend)
        torch.testing.assert_close(single.logits[2], whole.logits[2], rtol=1e-5, atol=1e-5)

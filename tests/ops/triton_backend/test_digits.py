"""The kernel of 8-bit digits, in Triton's interpreter; its sums of integers are exact there as on a GPU."""

import pytest
import torch
from packed_weights import random_packed

from optimum_arb.format.layout import all_layouts, planes_layout
from optimum_arb.ops.backends.triton import digits, dispatch, gemm
from optimum_arb.ops.backends.triton.dense_plan import DensePlan
from optimum_arb.ops.backends.triton.gemm_config import GemmConfig, is_fusable
from optimum_arb.ops.backends.triton.launch import tensor_class
from optimum_arb.ops.backends.triton.table import Entry

pytestmark = pytest.mark.usefixtures("poisoned")

LAYOUTS = {layout.name: layout for layout in all_layouts() if not layout.salient}
CONFIG = GemmConfig("digits", 1, 128, 4, 3, 1, 8)
# out_features, in_features, block_size, permuted
SHAPES = [
    (1, 64, 64, False),
    (6, 100, 128, True),
    (42, 192, 64, True),
    (123, 576, 128, False),
    (9, 576, 256, True),
    pytest.param(3, 4304, -1, True, marks=pytest.mark.slow),
    (3, 340, -1, True),
    (431, 192, 128, True),
    (3, 3, 128, False),
    (5, 512, 128, False),
]


def random_input(m, columns, dtype=torch.float16, seed=0):
    return torch.randn(m, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(packed, x, bias=None, config=CONFIG, bound=1e-4):
    """Against float64, before the result is rounded: as exact as the one-bit kernel."""
    weight = packed.unpack().dequantize(torch.float64)
    size = (x.double().square() @ weight.square().T).sqrt().norm()
    added = 0 if bias is None else bias.double()
    result = digits.multiply(x, packed, bias, torch.float32, config)
    expected = x.double() @ weight.T + added
    assert result.shape == expected.shape
    assert (result - expected).norm() < bound * size
    return result


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name):
    packed = random_packed(LAYOUTS[name], 42, 300, permuted=True)
    check(packed, random_input(1, 300))
    check(random_packed(LAYOUTS[name], 6, 320, block_size=64), random_input(5, 320, torch.bfloat16))


@pytest.mark.parametrize(("rows", "columns", "block_size", "permuted"), SHAPES)
@pytest.mark.parametrize("name", ["planes-2-col", "planes-3-mean"])
def test_shapes(name, rows, columns, block_size, permuted):
    check(random_packed(LAYOUTS[name], rows, columns, block_size, permuted=permuted), random_input(3, columns))


@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 16])
def test_tokens(m):
    packed = random_packed(planes_layout(1, col_scale=True), 42, 192)
    x = random_input(m, 384)
    for given in (x[:, :192], x[:, ::2], x.T[:192].contiguous().T)[: 3 if m == 3 else 1]:
        result = check(packed, given)
    assert torch.equal(check(packed, given), result)


@pytest.mark.parametrize("bias", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype, bias):
    packed = random_packed(planes_layout(2, col_scale=True), 42, 192, permuted=True)
    added = None if bias is None else random_input(1, 42, bias, seed=1)[0]
    x = random_input(4, 192, dtype)
    full, half = check(packed, x, added), gemm.gemm(x, packed, added, config=CONFIG)
    assert half.dtype == dtype
    assert ((half - full).abs() <= torch.finfo(dtype).eps * full.abs()).all()  # the interpreter truncates
    packed.row_scale, packed.col_scale = packed.row_scale.float(), packed.col_scale.bfloat16()
    check(packed, x, added)


@pytest.mark.parametrize(("split_k", "units"), [(1, 1), (2, 4), (3, 2), (8, 8), (8, 4)])
def test_cuts(split_k, units):
    """Units that do not divide evenly among programs or products, and fewer of them than programs."""
    bias = torch.randn(20)
    for columns, block_size in ((700, 128), (320, 64)):
        packed = random_packed(planes_layout(1, mean=True), 20, columns, block_size)
        check(packed, random_input(2, columns), bias, GemmConfig("digits", 2, 32, 4, 3, split_k, units))


@pytest.mark.parametrize("m", [1, 5, 16])
def test_batch(monkeypatch, m):
    """The rows as one product of matrices or as one for each warp, bit for bit."""
    x = random_input(m, 300)
    for packed in (random_packed(planes_layout(2, mean=True), 42, 300), random_packed(planes_layout(1), 70, 300, 64)):
        config = GemmConfig("digits", m, 64, 4, 3, 2, 2)
        found = []
        for batch in (1, config.warps):
            monkeypatch.setattr(digits, "_batch", lambda device, config, columns, batch=batch: batch)
            found.append(check(packed, x, config=config))
        assert torch.equal(*found)


def test_where_products_are_batches(monkeypatch):
    """On sm_90 where one product would have 8 columns, on newer GPUs always, where a warp has the rows of one."""
    for major, batches in ((8, [1, 1, 1]), (9, [4, 1, 1]), (10, [4, 4, 1]), (0, [1, 1, 1])):
        monkeypatch.setattr(digits, "capability", lambda device, major=major: (major, 0))
        tried = [(64, 8), (64, 16), (32, 8)]
        configs = [(GemmConfig("digits", 1, rows, 4, 3, 1, 4), columns) for rows, columns in tried]
        assert [digits._batch(torch.device("cuda", 0), *given) for given in configs] == batches


def test_a_row_does_not_depend_on_the_others():
    packed = random_packed(planes_layout(2, col_scale=True), 42, 300)
    x = random_input(16, 300)
    config = GemmConfig("digits", 16, 64, 4, 3, 2, 4)
    whole = digits.multiply(x, packed, None, torch.float32, config)
    for m in (1, 7):
        assert torch.equal(digits.multiply(x[-m:], packed, None, torch.float32, config), whole[-m:])


def test_digits():
    """Those of an input as they are defined, bit for bit; steps are what 1 stands for."""
    packed = random_packed(planes_layout(2, col_scale=True), 6, 300, permuted=True)
    x = random_input(2, 300)
    x[1, packed.permutation[0, :128].long()] = 0  # a tile of zeros
    plan = digits.DigitsPlan(packed, 2, 300, tensor_class(x), x.dtype, None, x.device, CONFIG)
    stored, steps = torch.empty(plan.digits, dtype=torch.int8), torch.empty(plan.steps)
    plan.prepare(plan.prepare_arguments(x, stored, steps))
    stored, steps = stored.view(2, 3, 8, 2, 2, 16).int(), steps.view(2, 3, 2)
    number = stored[:, :, :, :, 0] * 256 + stored[:, :, :, :, 1]  # input, tile, bit, token, byte
    scaled = x.float()[:, packed.permutation[0].long()] * packed.col_scale[:, None].float()
    for tile, (start, stop, count) in enumerate(((0, 128, 16), (128, 256, 16), (256, 300, 6))):
        values = scaled[:, :, start:stop]
        most = values.abs().amax(2)
        step = most / 32639
        assert torch.equal(steps[:, tile], step)
        wanted = (values * torch.where(most > 0, 32639 / most, 0)[:, :, None] + 0.5).floor().int()
        wide = torch.zeros(2, 2, 8 * count, dtype=torch.int32)
        wide[:, :, : stop - start] = wanted
        found = number[:, tile].transpose(1, 2)
        assert torch.equal(found[..., :count], wide.view(2, 2, 8, count))
        assert not found[..., count:].any()


def test_sizes_of_inputs():
    """The largest and smallest that float32 and bfloat16 have, and zeros."""
    packed = random_packed(planes_layout(1), 6, 256)
    for scale in (0.0, 1e-30, 1e30):
        x = random_input(2, 256, torch.float32) * scale
        found = digits.multiply(x, packed, None, torch.float32, CONFIG)
        expected = x.double() @ packed.unpack().dequantize(torch.float64).T
        assert (found - expected).norm() <= 1e-4 * expected.norm()
    tiny = torch.full((1, 256), 1e-38, dtype=torch.bfloat16)
    assert gemm.gemm(tiny, packed, config=CONFIG).abs().max() < 1e-32


def test_not_a_number_reaches_the_result():
    packed = random_packed(planes_layout(2, col_scale=True), 42, 512)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = random_input(3, 512)
        x[1, 100] = bad
        result = gemm.gemm(x, packed, config=CONFIG)
        assert not torch.isfinite(result[1]).any()
        assert torch.isfinite(result[::2]).all()


def test_what_it_does_not_compute():
    """Salient columns, more tokens, and float32, which it would round, go by way of the dense weight."""
    salient = random_packed(next(layout for layout in all_layouts() if layout.salient), 6, 192)
    assert not is_fusable(salient)
    with pytest.raises(ValueError, match="has salient columns"):
        digits.multiply(random_input(1, 192), salient, None, torch.float32, CONFIG)
    plain = random_packed(planes_layout(1), 6, 192)
    for packed, x in (
        (salient, random_input(1, 192)),
        (plain, random_input(17, 192)),
        (plain, random_input(1, 192, torch.float32)),
    ):
        expected = x.double() @ packed.unpack().dequantize(torch.float64).T
        found = gemm.gemm(x, packed, config=CONFIG)
        assert (found - expected).norm() < (2e-3 if x.dtype == torch.float16 else 1e-6) * expected.norm()
        assert isinstance(gemm.plan(x, packed, None, CONFIG), DensePlan)


def test_plan():
    packed = random_packed(planes_layout(2, col_scale=True), 42, 300, permuted=True)
    bias = torch.randn(42).half()
    for shape, split_k in (((300,), 1), ((1, 300), 2), ((2, 1, 300), 1)):
        x = torch.randn(shape).half()
        config = GemmConfig("digits", 1, 64, 4, 3, split_k, 4)
        plan = gemm.plan(x, packed, bias, config)
        assert plan is not None
        found = plan.run(x, bias)
        assert found.shape == (*shape[:-1], 42)
        assert torch.equal(found.view(-1, 42), gemm.gemm(x.view(-1, 300), packed, bias, config=config))


def test_candidates_and_default():
    for m in (1, 2, 4, 16):
        for n, k in ((4096, 4096), (28672, 8192), (4096, 11008), (42, 192)):
            found = digits.candidates(n, k, m)
            assert found
            assert len(found) == len(set(found))
            assert all(config.kernel == "digits" and config.split_k * 128 <= k for config in found)
    for columns, block_size in ((64, 64), (300, 128), (1024, -1)):
        packed = random_packed(planes_layout(1), 20, columns, block_size)
        for m in (1, 5):
            check(packed, random_input(m, columns), config=digits.default_config(packed, m))


@pytest.fixture
def machine(monkeypatch):
    """A GPU without products of one bit that no table knows; what is written here it has."""
    has = {"one_bit": False, "digits": True}
    entries: dict[int, Entry] = {}
    monkeypatch.setattr(dispatch, "has_one_bit_kernel", lambda device: has["one_bit"])
    monkeypatch.setattr(dispatch, "has_digits_kernel", lambda device: has["digits"])
    monkeypatch.setattr(dispatch, "lookup", lambda device, n, k, planes, tokens, half=False: entries.get(tokens))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: has.get("capturing", False))
    cached = dispatch._tuned
    cached.cache_clear()
    monkeypatch.setattr(dispatch, "_needing_digits", {})
    yield has, entries
    cached.cache_clear()


def chosen(packed, m, dtype=torch.float16):
    dispatch._needing_digits.clear()
    dispatch._tuned.cache_clear()
    return dispatch._config(torch.device("cuda", 0), dtype, m, packed).kernel


def test_where_it_is_chosen(machine):
    has, entries = machine
    packed = random_packed(planes_layout(1), 20, 256)
    others = {"portable", "dequantize"}
    assert [chosen(packed, m) for m in (1, 4, 5, 16)] == ["digits"] * 4
    assert chosen(packed, 17) in others
    assert chosen(packed, 1, torch.float32) in others
    assert chosen(random_packed(next(layout for layout in all_layouts() if layout.salient), 20, 256), 1) in others
    entries[1] = Entry(20, 256, 1, 1, "one_bit", {"warps": 8})  # whose self-check has failed
    entries[4] = Entry(20, 256, 1, 4, "portable", {"kernel": "portable"})
    entries[8] = Entry(20, 256, 1, 8, "digits", {"kernel": "digits", "split_k": 2})
    assert [chosen(packed, m) for m in (1, 3, 8, 16)] == ["digits", "portable", "digits", "digits"]
    has["one_bit"] = True  # then few tokens are computed elsewhere, unless a weight is not prepared
    assert [chosen(packed, m) for m in (1, 8)] == ["digits", "digits"]  # the table's for 8 tokens
    has["digits"] = False
    assert all(chosen(packed, m) in others for m in (1, 8))
    has["one_bit"] = False
    assert all(chosen(packed, m) in others for m in (1, 8, 16))


def test_nothing_is_checked_in_a_capture(machine):
    has, _ = machine
    packed = random_packed(planes_layout(1), 20, 256)
    has["capturing"] = True
    assert chosen(packed, 1) != "digits"
    assert not dispatch._needing_digits
    has["capturing"] = False
    assert chosen(packed, 1) == "digits"
    has["capturing"] = True
    assert dispatch._config(torch.device("cuda", 0), torch.float16, 1, packed).kernel == "digits"

"""How the products on sm_90 make weights of packed bytes: their assembly in an emulator."""

import numpy as np
import ptx
import pytest
import torch
from packed_weights import random_packed

from optimum_arb.format.layout import all_layouts

hopper_decode_rows = pytest.importorskip("optimum_arb.ops.backends.triton.hopper_decode_rows", exc_type=ImportError)
LAYOUTS = {layout.name: layout for layout in all_layouts() if layout.name.startswith("planes-")}
ROWS, TILES = 32, 3


def twice(values: torch.Tensor) -> np.ndarray:
    """Each value in both halves of a register."""
    value = values.half().numpy().view(np.uint16).astype(np.uint32)
    return value | value << 16


def pairs(values: torch.Tensor) -> np.ndarray:
    """Neighbours `[..., 2 n]` in a register: `[..., n]`."""
    return np.ascontiguousarray(values.half().numpy()).view(np.uint32)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("operand", [False, True])
def test_weights(name, operand):
    """Lanes are rows; a bit's shift is an operand where one thread has weights of several bits."""
    layout = LAYOUTS[name]
    packed = random_packed(layout, ROWS, 128 * TILES)
    expected = packed.unpack().dequantize(torch.float64).numpy()
    tiles = packed.weight.view(ROWS, TILES, layout.planes, 16).numpy()
    mean, columns = int(layout.row_scales > layout.planes), bool(layout.col_scales)
    for tile in range(TILES):
        scales = twice(packed.row_scale.view(ROWS, TILES, -1)[:, tile])  # [rows, scales]
        for bit in range(8):
            for pair in range(8):
                words = []
                for p in range(layout.planes):
                    both = np.ascontiguousarray(tiles[:, tile, p, 2 * pair : 2 * pair + 2]).view(np.uint16)[:, 0]
                    # one register has two pairs, as shared memory has them
                    found = ptx.run(
                        "{ " + hopper_decode_rows.SPREAD.value + " }",
                        hopper_decode_rows.SPREAD_CONSTRAINTS.value,
                        [both.astype(np.uint32) | both.astype(np.uint32) << 16],
                    )
                    assert (found[0] == found[1]).all()
                    words.append(found[0])
                values = [*words, *(scales[:, i] for i in range(layout.planes + mean))]
                if columns:
                    at = 128 * tile + 16 * bit + 2 * pair
                    values += [np.broadcast_to(pairs(c[at : at + 2]), ROWS) for c in packed.col_scale]
                if operand:
                    values.append(np.full(ROWS, 7 - bit, dtype=np.uint32))
                arguments = (layout.planes, columns, mean, False, -1 if operand else bit)
                asm = hopper_decode_rows._asm(*arguments)
                (result,) = ptx.run(asm, hopper_decode_rows._constraints(len(values)), values)
                found = np.ascontiguousarray(result)[:, None].view(np.float16).astype(np.float64)
                wanted = expected[:, 128 * tile + 16 * bit + 2 * pair :][:, :2]
                assert np.abs(found - wanted).max() < 2e-2

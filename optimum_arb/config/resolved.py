"""`ResolvedChoices`: what a method makes of the choices that were left open, and what follows of them all."""

from __future__ import annotations

from typing import Any

from ..format.factors import LAYOUT_NAME as FACTORS
from ..format.factors import factor_shapes, rank_for_bits
from ..format.layout import Layout, bitmap_layout, planes_layout
from ..format.packing import packed_shapes
from ..version import FIRST_READERS
from .choices import BITMAP_METHODS


class ResolvedChoices:
    """The properties of an `ARBConfig` that are computed from its choices."""

    method: str
    planes: int
    block_size: int
    group_bitmap: str | None
    salient_columns: str | int | None
    num_iterations: int | None
    refinement_sweeps: int | None
    dataset: Any
    damp_percent: float | None
    act_order: bool | None
    col_scale: bool | None
    admm_iterations: int | None
    shrinkage: float | None
    hadamard: int
    rank: int | None
    factor_bits: float | None
    scale_bits: int | None
    error_correction: float | None
    target_bits_per_weight: float | None
    overrides: dict[str, dict[str, Any]]

    @property
    def resolved_group_bitmap(self) -> str:
        if self.method not in BITMAP_METHODS:
            return "none"
        return self.group_bitmap or ("non-salient" if self.method == "billm" else "all")

    @property
    def resolved_salient_columns(self) -> str | int:
        if self.method not in BITMAP_METHODS:
            return 0
        return "search" if self.salient_columns is None else self.salient_columns

    @property
    def resolved_num_iterations(self) -> int:
        if self.num_iterations is not None:
            return self.num_iterations
        return {"arb-hrc": 2, "arb-dbf": 60}.get(self.method, 15)

    @property
    def resolved_refinement_sweeps(self) -> int:
        if self.refinement_sweeps is not None:
            return self.refinement_sweeps
        if self.resolved_admm_iterations:
            return 2
        # SmolLM2-135M: perplexity 70.7 and 74.5 at two planes without, 66.0 and 67.6 with one sweep; at one plane 818
        # to 916 (4 runs) without, 776 to 1,083 (3 runs) with
        return 1 if self.method == "arb-hrc" and self.planes > 1 else 0

    @property
    def resolved_admm_iterations(self) -> int:
        if self.method != "arb-hrc" or self.dataset is None:
            return 0
        return 25 if self.admm_iterations is None else self.admm_iterations

    @property
    def resolved_shrinkage(self) -> float:
        if self.shrinkage is not None:
            return self.shrinkage
        return 0.05 if self.method == "arb-hrc" else 0.0

    @property
    def resolved_error_correction(self) -> float:
        if self.dataset is None:
            return 0.0
        if self.error_correction is not None:
            return self.error_correction
        # second half of the WikiText-2 validation file, SmolLM2-135M on 32 x 1024 tokens, strengths 0, 0.5 and 1: two
        # planes 54.2, 35.9, 37.5; one plane 881, 147, 114; factors of 1.18 bits 275.7, 67.3, 68.7 (69.3 at 0.75)
        return 0.75 if self.method in ("arb-hrc", "arb-dbf") else 0.0

    @property
    def resolved_damp_percent(self) -> float:
        if self.damp_percent is not None:
            return self.damp_percent
        # on the second half of the WikiText-2 validation file SmolLM2-135M at one plane has a perplexity of 786 to
        # 879 at 0.02 (4 runs of slightly different damping), 957 and 1,039 at 0.01, 1,278 at 0.03. Factors at 1.18
        # bits: held-out output error, mean of 14 matrices, .0837 at 0.02, .0829 at 0.05
        return {"arb-hrc": 0.02, "arb-dbf": 0.05}.get(self.method, 0.01)

    @property
    def resolved_act_order(self) -> bool:
        """Whether columns are permuted; never without calibration, where there is no activation to order by."""
        if self.dataset is None:
            return False
        if self.act_order is not None:
            return self.act_order
        # one plane of 5 matrices of SmolLM2-135M, held-out output error: .1374 with and without after the search of all
        # blocks at once, .1503 and .1614 block by block
        return self.method == "arb-hrc" and not self.resolved_admm_iterations

    @property
    def format_version(self) -> int:
        """The format of the files that these choices make: the oldest that holds them."""
        every = [
            {"method": self.method, "scale_bits": self.resolved_scale_bits, "hadamard": self.hadamard},
            *self.overrides.values(),
        ]
        new = (one.get("method") == "arb-dbf" or one.get("scale_bits") == 8 or one.get("hadamard") for one in every)
        return 2 if any(new) else 1

    @property
    def factorized(self) -> bool:
        """Whether weights become products of two sign matrices, which have a rank and no layout."""
        return self.method == "arb-dbf"

    @property
    def resolved_scale_bits(self) -> int:
        return self.scale_bits or 16

    def resolved_rank(self, out_features: int, in_features: int) -> int:
        """The rank of the factors of a weight `[out_features, in_features]`."""
        if self.rank is not None:
            return self.rank
        bits = 1.0 if self.factor_bits is None else self.factor_bits
        return rank_for_bits(out_features, in_features, bits, self.resolved_scale_bits)

    @property
    def requirement(self) -> str:
        """What to install to read a model of this configuration's format."""
        return f"optimum-arb>={FIRST_READERS[self.format_version]}"

    @property
    def resolved_col_scale(self) -> bool:
        """Whether the planes of arb-hrc have column scales."""
        return True if self.col_scale is None else self.col_scale

    @property
    def layout(self) -> Layout:
        """The layout of the weights that these choices make.

        Raises:
            ValueError: they make products of two sign matrices.
        """
        if self.factorized:
            raise ValueError(f"method={self.method!r} makes products of two sign matrices, which have no layout.")
        if self.method == "rtn":
            return planes_layout(1)
        if self.method == "arb-hrc":
            return planes_layout(self.planes, col_scale=self.resolved_col_scale)
        return bitmap_layout(
            self.resolved_group_bitmap, self.resolved_salient_columns != 0, col_scale=self.method == "arb-rc"
        )

    @property
    def layout_name(self) -> str:
        """The name of the form of the weights, as reports have it."""
        return FACTORS if self.factorized else self.layout.name

    def stored_shapes(
        self, out_features: int, in_features: int, permuted: bool, salient: int = 0
    ) -> dict[str, tuple[int, int]]:
        """The shape of every tensor that a linear's weight is stored in, by `optimum_arb.format.packing.STORED_NAMES`.

        Args:
            out_features: N.
            in_features: K.
            permuted: whether its columns are permuted.
            salient: the number of its salient columns.
        """
        if self.factorized:
            rank = self.resolved_rank(out_features, in_features)
            return factor_shapes(out_features, in_features, rank, self.resolved_scale_bits)
        transform = self.hadamard if self.dataset is not None else 0
        bits = self.resolved_scale_bits
        return packed_shapes(
            self.layout, out_features, in_features, self.block_size, permuted, salient, bits, transform
        )

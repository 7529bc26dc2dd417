"""What an evaluation measures, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .generation import PROMPTS
from .perplexity import check_whole

PARTS = ("perplexity", "divergence", "tasks", "generation", "memory", "latency", "energy")


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        parts: of `PARTS`. "tasks" is measured where tasks are named.
        texts: bundled names or paths, for perplexity and divergence.
        context_length: tokens of a window; None is 2048, or the models' positions if they are fewer.
        max_windows: of each text; None is all.
        batch_size: windows of a forward pass, and requests of the tasks.
        tasks, include_path, limit: see `tasks.run_tasks`.
        prompts, sample_tokens, chat: see `generation.sample`.
        batch_sizes, prompt_tokens, new_tokens, repeats: see `latency.measure_latency`.
        static_cache: generate with a static cache, which transformers compiles on a GPU.
        energy_seconds: see `energy.measure_energy`.
        price_per_hour: of the machine, for the cost of a million tokens; None tells no cost.
        currency: of the price.
        dtype, device_map, backend: how the models are loaded (the backend, of binarized ones).
        seed: of torch, before each model.
    """

    parts: tuple[str, ...] = ("perplexity",)
    texts: tuple[str, ...] = ("wikitext-2-test",)
    context_length: int | None = None
    max_windows: int | None = None
    batch_size: int = 1
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = None
    prompts: tuple[str, ...] = PROMPTS
    sample_tokens: int = 48
    chat: bool = False
    batch_sizes: tuple[int, ...] = (1,)
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 5
    static_cache: bool = False
    energy_seconds: float = 5.0
    price_per_hour: float | None = None
    currency: str = "USD"
    dtype: str = "auto"
    device_map: str = "cpu"
    backend: str | None = None
    seed: int = 0

    def generate_options(self) -> dict[str, Any]:
        """What `generate` gets besides the tokens."""
        return {"cache_implementation": "static"} if self.static_cache else {}

    def check(self) -> None:
        """
        Raises:
            ValueError: a value out of range, which its part would tell when it is measured, maybe hours later.
        """
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is nothing that can be measured: use {', '.join(PARTS)}.")
        for name, value, low in (
            ("context_length", self.context_length, 2),
            ("max_windows", self.max_windows, 1),
            ("batch_size", self.batch_size, 1),
            ("limit", self.limit, 1),
            ("sample_tokens", self.sample_tokens, 1),
            *(("batch_sizes", size, 1) for size in self.batch_sizes),
            ("prompt_tokens", self.prompt_tokens, 1),
            ("new_tokens", self.new_tokens, 2 if "latency" in self.parts else 1),
            ("repeats", self.repeats, 1),
        ):
            if value is not None:
                check_whole(name, value, low)
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r} must be a whole number of 64 bits.")
        if not all(self.prompts):
            raise ValueError("A prompt is empty: give a text to continue.")
        if not 0 < self.energy_seconds < math.inf:
            raise ValueError(f"energy_seconds={self.energy_seconds} must be a number above 0.")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            raise ValueError(f"price_per_hour={self.price_per_hour} must be a number of at least 0.")

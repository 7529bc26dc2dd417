"""How fast a model reads a prompt and generates, beside another one: the runs of both alternate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ..result import Result
from .perplexity import check_whole, input_device, model_positions


@dataclass(frozen=True)
class Latency(Result):
    """One model at one batch size; every figure is a median over the repeats.

    Attributes:
        model: its name.
        batch_size: sequences at a time.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens generated after each.
        repeats: measured runs; one more came before them and does not count.
        prefill_seconds: from the call to the first new token.
        decode_seconds: of each further token (of the whole batch): the time from the first to the last, over their
            number.
        slowest_decode_seconds: the 95th percentile of the single steps of all runs.
        prefill_tokens_per_second: prompt tokens of the whole batch over `prefill_seconds`.
        decode_tokens_per_second: the batch over `decode_seconds`.
        prefill_speedup, decode_speedup: the baseline's time over the model's in the same round, the median over the
            rounds; None of the baseline itself, and without one.
    """

    model: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill_seconds: float
    decode_seconds: float
    slowest_decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_speedup: float | None = None
    decode_speedup: float | None = None


def check_positions(prompt_tokens: int, new_tokens: int, positions: int | None) -> None:
    """Raises ValueError where a model has fewer positions (None: no limit) than are generated."""
    if positions is not None and prompt_tokens + new_tokens > positions:
        raise ValueError(
            f"prompt_tokens={prompt_tokens} and new_tokens={new_tokens} are more than the {positions} positions of "
            "the model: use fewer."
        )


def measure_latency(
    models: Mapping[str, PreTrainedModel],
    baseline: str | None = None,
    batch_sizes: Sequence[int] = (1,),
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    generate_options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> list[Latency]:
    """Times `generate` on random prompts.

    In each round every model runs once, in an order that turns round from round to round, so that a machine whose speed
    changes does not favour one. Both figures come from the same call: a clock in `generate` notes each token.

    Args:
        models: name -> model, in eval mode.
        baseline: the name of the model that the speedups refer to.
        batch_sizes: see `Latency`.
        prompt_tokens, new_tokens: at least 1 and 2, together no more than the models have positions.
        repeats: rounds that count.
        generate_options: more options of `generate` (`cache_implementation="static"`).
        progress: show a progress bar on stderr.

    Returns:
        One for each batch size and model.

    Raises:
        ValueError: an argument is out of range.
    """
    for name, value, low in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("repeats", repeats, 1),
    ):
        check_whole(name, value, low)
    for size in batch_sizes:
        check_whole("batch_size", size, 1)
    for model in models.values():
        check_positions(prompt_tokens, new_tokens, model_positions(model))
    options = dict(generate_options or {})
    found: list[Latency] = []
    with tqdm(total=len(batch_sizes) * (repeats + 1) * len(models), desc="latency", disable=not progress) as bar:
        for size in batch_sizes:
            # the same prompts for all, from the smaller vocabulary
            smallest = min(models.values(), key=vocabulary)
            prompt = random_prompt(smallest, size, prompt_tokens)
            rounds: dict[str, list[list[float]]] = {name: [] for name in models}
            for index in range(repeats + 1):
                for name in list(models)[:: -1 if index % 2 else 1]:
                    times = generate(models[name], prompt, new_tokens, options)
                    if index:  # the first plans, compiles and pages in
                        rounds[name].append(times)
                    bar.update()
            found += [
                _summary(name, size, prompt_tokens, new_tokens, rounds, None if name == baseline else baseline)
                for name in models
            ]
    return found


def generate(
    model: Any, prompt: torch.Tensor, new_tokens: int, options: Mapping[str, Any] | None = None
) -> list[float]:
    """Generates greedily, and notes the clock at the call and after each token: float seconds `[new_tokens + 1]`."""
    clock = _Clock(model)
    prompt = prompt.to(input_device(model))
    clock.note()
    with torch.no_grad():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
            **(options or {}),
        )
    return clock.times


def random_prompt(model: PreTrainedModel, batch_size: int, tokens: int) -> torch.Tensor:
    """Token ids int64 `[batch_size, tokens]`, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary(model), (batch_size, tokens), generator=generator)


def vocabulary(model: Any) -> int:
    """How many tokens a model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


class _Clock(StoppingCriteria):
    """Never stops `generate`; notes the time whenever it asks, which is after each token."""

    def __init__(self, model: PreTrainedModel):
        self.cuda = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
        self.times: list[float] = []

    def note(self) -> None:
        for device in self.cuda:
            torch.cuda.synchronize(device)
        self.times.append(time.perf_counter())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        self.note()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _summary(
    name: str, size: int, prompt: int, new: int, rounds: Mapping[str, list[list[float]]], baseline: str | None
) -> Latency:
    prefill, decode = _parts(rounds[name])
    steps = sorted(b - a for times in rounds[name] for a, b in pairwise(times[1:]))
    speedups: tuple[float | None, float | None] = (None, None)
    if baseline is not None:
        other = _parts(rounds[baseline])
        ratios = [[a / b for a, b in zip(*pair, strict=True)] for pair in ((other[0], prefill), (other[1], decode))]
        speedups = (statistics.median(ratios[0]), statistics.median(ratios[1]))
    return Latency(
        model=name,
        batch_size=size,
        prompt_tokens=prompt,
        new_tokens=new,
        repeats=len(prefill),
        prefill_seconds=statistics.median(prefill),
        decode_seconds=statistics.median(decode),
        slowest_decode_seconds=steps[min(len(steps) - 1, int(0.95 * len(steps)))],
        prefill_tokens_per_second=size * prompt / statistics.median(prefill),
        decode_tokens_per_second=size / statistics.median(decode),
        prefill_speedup=speedups[0],
        decode_speedup=speedups[1],
    )


def _parts(runs: list[list[float]]) -> tuple[list[float], list[float]]:
    """Of each run, the seconds to the first token and of each further one."""
    return [t[1] - t[0] for t in runs], [(t[-1] - t[1]) / (len(t) - 2) for t in runs]

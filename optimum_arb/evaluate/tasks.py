"""Tasks of lm-evaluation-harness on a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel


def check_lm_eval() -> None:
    """To be asked before models are loaded.

    Raises:
        ImportError: lm_eval is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ImportError("Tasks need lm-evaluation-harness: pip install 'optimum-arb[eval]'") from None


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, as lm-evaluation-harness names them ("acc,none", "acc_stderr,none").

    Args:
        model, tokenizer: as loaded.
        tasks: names of its tasks, or of tasks of your own.
        include_path: a directory with the YAML files of your own tasks (docs/lm_eval.md has one with local data).
        limit: questions of each task, from its start.
        batch_size: of its requests.

    Raises:
        ImportError: lm_eval is not installed.
        ValueError: an unknown task.
    """
    check_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"lm-evaluation-harness knows no task {unknown[0]!r}; --include-path names a directory of yours."
        )
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # type: ignore[arg-type]
    results = simple_evaluate(harness, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000)
    return {
        task: {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
        for task, values in results["results"].items()
    }

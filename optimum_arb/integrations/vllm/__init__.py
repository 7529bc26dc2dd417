"""The vLLM plug-in: `vllm serve` and `vllm.LLM` load binarized models once this package is installed.

vLLM calls `register` through the entry point group `vllm.general_plugins` in every process that it starts. Nothing of
vLLM is imported before.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Makes vLLM know `quant_method: "arb"`; does nothing the second time.

    A version of vLLM whose interface does not fit is a warning and no error: it may be serving another model.
    """
    try:
        from . import config  # noqa: F401 (registers the class that it defines)
    except ImportError as error:
        logger.warning(
            "optimum_arb could not register with this vLLM, binarized models will be refused: %s. The plug-in was "
            "tested with vLLM 0.32: see docs/vllm.md.",
            error,
        )

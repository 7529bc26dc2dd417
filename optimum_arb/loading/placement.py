"""Where a model runs: the device that calibrates it, and its devices once it is binarized."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration.distributed import local_device
from ..calibration.ranks import Ranks


def check_no_disk(device_map: Any) -> None:
    """Raises ValueError where a part of the model would be offloaded to disk before it is binarized."""
    if isinstance(device_map, dict) and "disk" in {str(device) for device in device_map.values()}:
        raise ValueError(
            "A model cannot be binarized while parts of it are offloaded to disk. Binarize it with device_map='cpu', "
            "save it, and load the saved model with the device map that you want."
        )


def calibration_device(device_map: Any, ranks: Ranks | None = None) -> torch.device:
    """The accelerator, if the user's device map lets the model use one, else the CPU. Each rank has its own.

    Raises:
        ValueError: there are fewer accelerators than ranks on this host.
    """
    return local_device(_calibration_device(device_map), ranks or Ranks())


def _calibration_device(device_map: Any) -> torch.device:
    # asked for where there is none, torch 2.6 raises
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = list(device_map.values()) if isinstance(device_map, dict) else []
    for device in devices:
        if str(device) not in ("cpu", "disk", "meta"):
            kind = accelerator.type if accelerator is not None else "cuda"
            return torch.device(kind, device) if isinstance(device, int) else torch.device(device)
    if isinstance(device_map, str) and device_map != "cpu":
        return accelerator or torch.device("cpu")
    return torch.device("cpu")


def place_model(
    model: PreTrainedModel, device_map: Any, max_memory: dict | None = None, ranks: Ranks | None = None
) -> None:
    """Puts a binarized model, which is on the CPU, where the user's device map says; of several ranks, each on its own
    device.

    Args:
        model: the model.
        device_map: as given to `from_pretrained`; None leaves the model on the CPU.
        max_memory: as in `from_pretrained`.
        ranks: the processes that have the model.

    Raises:
        ValueError: the model does not fit without offloading to disk.
    """
    if device_map is None:
        return
    if ranks is not None and ranks.size > 1:
        model.to(calibration_device(device_map, ranks))  # type: ignore[arg-type]
        return
    if isinstance(device_map, str):
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        # accelerate takes a list; transformers keeps a set
        whole = sorted(model._no_split_modules or ())
        if device_map != "sequential":
            low_zero = device_map == "balanced_low_0"
            max_memory = get_balanced_memory(model, max_memory, no_split_module_classes=whole, low_zero=low_zero)
        device_map = infer_auto_device_map(model, max_memory, no_split_module_classes=whole)
    check_no_disk(device_map)
    devices = set(device_map.values())
    if len(devices) == 1:
        model.to(devices.pop())
    else:
        from accelerate import dispatch_model

        dispatch_model(model, device_map, skip_keys=model._skip_keys_device_placement)

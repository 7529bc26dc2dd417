"""1-bit large language models for Hugging Face: binarized while they load, packed on disk, run packed.

Importing this package registers `ARBConfig` and its quantizer with transformers.
"""

from .checkpoint.quantize import QuantizedCheckpoint, quantize_checkpoint
from .config import ARBConfig
from .format.packing import BinarizedWeight
from .nn import ARBExperts, ARBLinear
from .quantizer import ARBHfQuantizer
from .registration import register
from .report import ModelReport, ModuleReport, model_report
from .saving import check_output_directory, save_model
from .version import __version__

register()

__all__ = [
    "ARBConfig",
    "ARBExperts",
    "ARBHfQuantizer",
    "ARBLinear",
    "BinarizedWeight",
    "ModelReport",
    "ModuleReport",
    "QuantizedCheckpoint",
    "__version__",
    "check_output_directory",
    "model_report",
    "quantize_checkpoint",
    "save_model",
]

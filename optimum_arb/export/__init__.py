"""Binarized models in the file formats of other runtimes."""

from .gguf import GGUFReport, TensorReport, export_gguf

__all__ = ["GGUFReport", "TensorReport", "export_gguf"]

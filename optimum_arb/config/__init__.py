"""What a user chooses, and what a model records of it."""

from .arb_config import ARBConfig
from .choices import BITMAP_METHODS, METHODS, RECORDED

__all__ = ["BITMAP_METHODS", "METHODS", "RECORDED", "ARBConfig"]

"""Model cards, and uploads to the Hub that happen as a whole or not at all."""

from .base_model import base_model_facts
from .card import is_users_own, model_card, write_card
from .evaluation import record_perplexity
from .upload import check_access, push_directory

__all__ = [
    "base_model_facts",
    "check_access",
    "is_users_own",
    "model_card",
    "push_directory",
    "record_perplexity",
    "write_card",
]

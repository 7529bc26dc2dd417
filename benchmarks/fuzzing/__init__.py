"""What fuzz_checkpoints.py consists of: saved models, the changes made to them, and the processes that load them."""

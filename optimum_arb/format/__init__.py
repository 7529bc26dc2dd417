"""The stored form of a weight: which tensors there are, and what they mean. `docs/format.md` specifies it."""

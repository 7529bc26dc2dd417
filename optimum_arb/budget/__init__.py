"""`target_bits_per_weight`: a budget of stored bits, divided among the linears of a model."""

"""What is done to a model while transformers loads it; `optimum_arb.quantizer` says when."""

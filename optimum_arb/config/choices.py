"""What the choices of a configuration may be, and which of its keys are none of the user's."""

METHODS = ("rtn", "billm", "arb", "arb-x", "arb-rc", "arb-hrc", "arb-dbf")
# The method is chosen for each linear, within `target_bits_per_weight`.
AUTO = "auto"
# Which methods have sizes to choose from, and the keys that choose one.
SIZES = {"arb-hrc": ("planes",), "arb-dbf": ("rank", "factor_bits"), AUTO: ()}
BITMAP_METHODS = ("billm", "arb", "arb-x", "arb-rc")
BACKENDS = ("auto", "triton", "cpu", "reference", "dequantize", "auto:batch-invariant", "triton:batch-invariant")
HADAMARD_BLOCKS = (0, 64, 128, 256)
COMPENSATIONS = ("exact", "diagonal")
SPLIT_METRICS = ("weight", "score")
REFINEMENTS = ("block", "model")
# What an entry of `overrides` may change for the modules that its pattern matches.
OVERRIDABLE = (
    "method",
    "planes",
    "block_size",
    "group_bitmap",
    "salient_columns",
    "num_iterations",
    "refinement_sweeps",
    "compensation",
    "split_metric",
    "damp_percent",
    "act_order",
    "col_scale",
    "admm_iterations",
    "shrinkage",
    "hadamard",
    "rank",
    "factor_bits",
    "scale_bits",
)
# What a run records in the configuration of the model that it made.
RECORDED = ("optimum_arb_version", "bits_per_weight", "calibration", "base_model", "perplexity")
# What is chosen for each load.
LOADING = ("backend", "max_memory", "verify_checksums")
# Keys that transformers adds to a quantization config on its own.
TRANSFORMERS_KEYS = ("quant_method", "modules_in_block_to_quantize", "_load_in_4bit", "_load_in_8bit")

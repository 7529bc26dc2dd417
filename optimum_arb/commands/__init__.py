"""The command line: `optimum-arb`, `optimum-cli arb` and `python -m optimum_arb`. Thin: parse, call, print."""

"""Networks that jobs, examples and benchmarks share; each module needs one framework."""

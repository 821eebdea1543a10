"""Benchmarks: `python -m eval.<benchmark> --model … --data … --out results.json`, from a clone."""

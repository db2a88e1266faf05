"""Benches: each prints its numbers beside a floor measured in the same run. What came out is in RESULTS.md."""

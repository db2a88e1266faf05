"""The GRPO runner: Ray actors, data, reward, algorithm, metrics and loop. Runs from the checkout and is never imported by ``rlsync``."""

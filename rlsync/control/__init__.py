"""The typed channel between actor ranks and engine workers. Pure Python: no torch, no vLLM, no Megatron."""

from __future__ import annotations

from rlsync.control.messages import BucketEntry, buckets_digest, bytes_needed

__all__ = ["BucketEntry", "buckets_digest", "bytes_needed"]

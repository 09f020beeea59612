"""Benchmarks of dit_moe against dense DiT and against other mixture-of-experts libraries."""

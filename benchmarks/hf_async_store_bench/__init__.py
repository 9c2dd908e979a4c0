"""Benchmarks of hf_async_store: `hf-async-store bench`, `advise` and `demo`.

Every engine, hand-written baselines on the same drivers and what others would use instead, under
workloads named for what an orchestrator does, side by side in one run. Each system runs in processes
of its own, and has to show every acknowledged write at the end.

Only the public interface of the product is used: one harness can measure two commits of it.
"""

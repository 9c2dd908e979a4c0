"""Benchmarks of hf_async_store: `hf-async-store bench`, `advise` and `demo`.

Each system runs in processes of its own, and has to show every acknowledged write at the end. Only the
public interface of the product is used: one harness can measure two commits of it.
"""

"""Benchmarks of hf_async_store: `hf-async-store bench`, `advise` and `demo`. Only the public interface of
the product is used: one harness can measure two commits of it."""

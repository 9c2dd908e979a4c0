"""The product's main job on real input, checked to the last write: `hf-async-store demo`.

An async orchestrator and two more processes work on one store at once; one of them is killed in
the middle. Every process logs each write before and after, and at the end a freshly opened store
has to agree with those logs. Only the public interface is used, and no engine's name is asked.
"""

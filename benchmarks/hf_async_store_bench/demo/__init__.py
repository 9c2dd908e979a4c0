"""The product's main job, checked to the last write: `hf-async-store demo`.

Three processes work on one store at once; one of them is killed. Each logs every write before and
after, and at the end a freshly opened store has to agree with those logs.
"""

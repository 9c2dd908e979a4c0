"""The product's main job, checked to the last write: three processes work on one store, one is killed, and
a freshly opened store has to agree with what each of them logged."""

"""Baselines: the least code by hand that stores the same on the same driver: the same columns or indexes,
and a version that each write raises. They decide no conditions, check no values and tell no outcomes.
The docstring of each says in the report how it is made."""

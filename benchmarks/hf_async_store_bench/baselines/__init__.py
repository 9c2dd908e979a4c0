"""Baselines: the least code by hand that stores the same on the same driver.

They keep the same data as a store: the same columns, indexes and references (SQL), the same indexes
(DynamoDB), and a version that each write raises. They decide no conditions, check no values and
tell no outcomes. The docstring of each says in the report how it is made.
"""

"""Baselines: the least code by hand that stores the same on the same driver.

They keep the same data as a store: the same columns, indexes and references (SQL), the same indexes
(DynamoDB), and a version that each write raises. They decide no conditions, check no values and
tell no outcomes. What each does is said where it is listed (`systems.BASELINES`), and in the report.

A driver is imported by the module of its baseline, and only in the process that measures that.
"""

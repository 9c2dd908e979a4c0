"""The floors: the least code that does the same work on the same driver, written by hand.

They keep no versions, check no values and know no references, but for the rows of a burst (`rows`),
which leave the same behind as a store: what a store costs above them is what those cost. A driver
is imported by the module of its floor, and only in the process that measures that.
"""

"""The contract suite: the tests that every engine must pass, built-in or third-party."""

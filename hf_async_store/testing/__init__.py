"""The contract suite: what every engine must show, for engines of this package and of others."""

"""The peers: what a user would pick instead, each as its own documentation says to use it.

None of them is needed to install this package; what is not installed is told as left out. They keep
other promises than a store (most know neither versions nor transactions), so read their figures
beside what they do for them.
"""

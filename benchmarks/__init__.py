"""The suite's speed claims, measured here: each a ratio taken in one run, with its limit beside it."""

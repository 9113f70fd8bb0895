"""Vocabularies: telling them apart, and tying one to another."""

# How base columns find their partners, how base tokens are read on the way in, and what columns without a partner get.
METHODS = ("exact", "nearest", "aligned")
INPUTS = ("nearest", "last", "mean")
UNMAPPED = ("keep", "mean", "first")

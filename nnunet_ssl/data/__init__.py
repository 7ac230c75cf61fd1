"""Unlabelled cases, the two-stream loader and what a method sees of a batch."""

"""Figures of predictions, exact over any number of processes that each saw their share of the images.

A metric takes what a model predicts and the targets of the data: `update(predictions, targets)` on every process, then
`compute(world)`, which returns the same figures on all of them, in percent but for losses, and `per_class(world)`.
"""

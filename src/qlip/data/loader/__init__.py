"""Samples in order, made into batches by worker processes.

`sampler` maps positions to samples (`Permutation`, `Mixture`), `transforms` augments it, and `batch` has
the batch classes (`SampleBatch`, `Batch`). `stream.TrainingStream` joins them for images. `feed.PositionFeed` reads any
function of positions for the ranks of a training, in `workers`, with a state to resume from. `eval_set.EvalSet` reads a
source once, in its own order.
"""

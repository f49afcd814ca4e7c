"""Evaluators by name (`registry`).

An `Evaluator` sees all batches of a dataset: `Reconstruction`, `SetDistance`, `ZeroShot`, `Retrieval`, `Codebook`,
`Features`. A `RunOnce` runs once: `Probe`, `ThroughputBenchmark`. `text_embeddings` caches encoded prompts.
"""

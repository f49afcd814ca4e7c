"""Images to a dataset: `find` cuts an input into `InputShard`s, and `Run` writes a part for each.

`batches_of` decodes a shard into `ReadyBatch`es on CPU threads or Ray tasks, `Encoder` turns a batch into a table, and
`Run.write_parts` joins the tables of a shard. `encode_here` does all of it in one process, `on_ray` on a cluster.
"""

"""Lossless entropy coding of tokens with static tables.

`checkerboard` fixes the order of coding and which earlier bits each bit depends on. `Tables` holds a model's integer
weights; `train_tables.TableTraining` trains them. `Predictor` turns tables and the bits coded so far into the
probabilities of the next bits, and `TokenCodec` codes bits with them by a range coder. `TokenCodecs` finds the tables
that a file was coded with.
"""

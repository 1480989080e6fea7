"""Where KV lives on this instance: block ids, shards of sequences, and the tensors behind them."""

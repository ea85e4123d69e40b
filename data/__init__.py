"""Files to examples, examples to tokens and masks, tokens to batches: everything between a dataset on disk and one forward pass."""

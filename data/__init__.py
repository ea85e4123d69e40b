"""From files to batches: rows, conversations, chat templates, tokens and loss masks, packing, order."""

"""Text to tokens and back: the tokenizer, and what is read to make one."""

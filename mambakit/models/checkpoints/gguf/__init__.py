"""llama.cpp's GGUF: a checkpoint in one file, its tokenizer and chat template included.

`container` reads and writes the file, `blocks` its numbers, `vocabulary` its tokenizer, `names` its names and fields.
`format` is the `CheckpointFormat`.
"""

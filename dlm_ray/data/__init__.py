"""Training data: sources, tokens, packed sequences, webdataset shards, and an ordered mixture of data folders.

In every module L is the number of positions of a sequence. A sequence consists of segments, each of one document. Every
segment begins with a start token, which is never masked and never scored. A document that does not fit into the rest
of a sequence continues in the next one.
"""

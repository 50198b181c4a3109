"""Sources -> tokens -> packed rows -> webdataset shards -> an ordered, seekable mixture.

Legend of every module here: L positions of a row. A document stands in one or more segments; every segment begins with a start
token, which is never masked and never scored. A document that does not fit into the rest of a row goes on in the next one.
"""

"""What a model folder holds: documents, headers, layers as ranges of bytes. Reads no more than it is asked for."""

"""What a model folder holds: documents, headers, layers as byte ranges. Knows no device and no placement."""

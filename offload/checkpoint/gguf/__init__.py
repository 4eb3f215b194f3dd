"""GGUF files: what they say of a model, as the documents and the tensor names that transformers knows. No torch."""

"""Files of other programs: GGUF, and Mistral's own layout, as documents and names that transformers knows. No torch."""

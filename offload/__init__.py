"""Weights in motion: any safetensors checkpoint in, a transformers model whose layers stream out."""

"""Commands about models and machines: what is here, what would fit, bringing and packing it."""

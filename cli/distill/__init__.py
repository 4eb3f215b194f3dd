"""Commands that make a drafter: texts of a model recorded, a head or a small model trained on them."""

"""Files that torch.save wrote: where their tensors lie. Nothing of a pickle is run. Knows no torch."""

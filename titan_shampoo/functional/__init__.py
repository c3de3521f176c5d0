"""The mathematics of preconditioning on stacks of equal blocks, local tensors in and out."""

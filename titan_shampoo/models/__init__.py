"""Models of the recipes that torchtitan does not have."""

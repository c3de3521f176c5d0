"""Models that the recipes train and torchtitan does not bring."""

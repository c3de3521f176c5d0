"""Each algorithm once more: naive, dense, float64, numpy, sharing no code with the library."""

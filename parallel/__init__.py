"""Sharding of each recipe's model over the mesh."""

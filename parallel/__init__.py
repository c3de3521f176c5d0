"""How each recipe's model is sharded over the mesh."""

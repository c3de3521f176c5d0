"""Placement of blocks, their owners, and the messages between them; no arithmetic on values."""

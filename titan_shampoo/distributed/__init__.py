"""Where blocks live, who works on them, and how they get there; no arithmetic on values."""

"""How a matrix is sketched: pure functions of (key, matrix)."""

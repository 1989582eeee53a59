"""Data of the demo: `digits_test.npz` has the held-out images (uint8 [n, 64], 0 to 16) and labels (uint8 [n])."""

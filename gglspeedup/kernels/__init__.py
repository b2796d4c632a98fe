"""Kernels: one file an operation and target; they validate nothing (the public calls have)."""

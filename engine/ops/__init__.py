"""Operations: one contract, a NumPy definition, and a fast implementation per kind of hardware.

Dimensions are spelled the same everywhere:
    T tokens (rows of a step)   S sequences   V vocabulary   C hidden size   F ffn size
    H query heads   KVH key/value heads   D head dim   N, K weight rows (outputs) and columns (inputs)   P positions
"""

"""Our forward pass for Gemma 3 and Llama models in bfloat16, on CPUs with AVX-512 BF16; see forward.c.

product_amx.c and product_avx512.c each implement the matrix product for one kind of CPU; `compile_kernels` chooses the
faster.
"""

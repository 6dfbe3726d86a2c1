"""Our own forward for Gemma 3 and Llama models in bfloat16, on CPUs with AVX-512 BF16: forward.c says what it does.

product_amx.c and product_avx512.c each offer the matrix product for one kind of processor; `compile_kernels` takes the
faster.
"""

"""Our own bfloat16 forward for Gemma 3 and Llama models on CPUs with AVX-512: see forward.c for what it does and keeps.

product_amx.c and product_avx512.c each offer the matrix product for one kind of processor; `build` takes the faster.
"""

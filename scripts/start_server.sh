#!/usr/bin/env bash
# Start (or stop) the OpenCode server that the teachers of a foundry.toml with backend = "opencode" stand behind.
#
#   scripts/start_server.sh [--config foundry.toml] [--port N]    # safe to repeat: a server that runs so is left alone
#   scripts/start_server.sh --stop [--config foundry.toml] [--port N]
#
#   --config FILE   the settings                        (foundry.toml, else recipes/foundry.toml)
#   --port N        which server, if they name several  (the port of the first opencode teacher's server_url)
#   --stop          stop that server
#
# Installs OpenCode (npm package opencode-ai, MIT) into a private folder if it is not there. The server listens on
# 127.0.0.1 only and asks for a password: OPENCODE_SERVER_PASSWORD, or one that is made and kept in a file that only
# you can read. The vendors' keys come from the environment variables that foundry.toml names and are written nowhere.
#
# Settings, as environment variables:
#   OPENCODE_SERVER_PASSWORD  the password                                 (made at the first start)
#   FOUNDRY_SERVER_DIR        folder of program, configuration and log     (~/.local/share/foundry/opencode)
#   OPENCODE_BIN              an OpenCode program that you have already    (installed there)
set -euo pipefail
umask 077
root=$(cd "$(dirname "$0")/.." && pwd)
version=1.18.33

fail() {
    echo "start_server.sh: $1" >&2
    exit 2
}

settings='' port='' stop=
while (($#)); do
    case $1 in
        -h | --help)
            sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"
            exit 0
            ;;
        --stop) stop=1 ;;
        --config | --port)
            (($# > 1)) || fail "$1 needs a value (see --help)"
            if [[ $1 == --port ]]; then port=$2; else settings=$2; fi
            shift
            ;;
        *) fail "unknown option $1 (see --help)" ;;
    esac
    shift
done
if [[ -z $settings ]]; then
    settings=foundry.toml
    [[ -f $settings ]] || settings=$root/recipes/foundry.toml
fi
[[ -z $port || $port =~ ^[0-9]+$ ]] || fail "--port $port: must be a number"

python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3) || fail "no Python: run \`make setup\` first"
[[ $settings == /* ]] || settings=$PWD/$settings
ours() { # WHAT [OPTION...]: foundry's side of the settings
    (cd "$root" && "$python" -m foundry.opencode_server "$1" "$settings" ${port:+--port "$port"} "${@:2}")
}
port=$(ours port)

home=${FOUNDRY_SERVER_DIR:-$HOME/.local/share/foundry/opencode}
server=$home/server-$port
mkdir -p "$server"/{home,config,data,state,cache,work}

running() { # the process of the pid file, if it is still a server of ours
    pid=$(cat "$server/pid" 2>/dev/null) && [[ -n $pid ]] &&
        tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q -- " serve .*--port $port "
}
halt() {
    if running; then
        kill "$pid" 2>/dev/null || true
        for _ in {1..50}; do
            running || break
            sleep 0.1
        done
        if running; then kill -9 "$pid" 2>/dev/null || true; fi
        echo "Stopped the server on port $port (process $pid)."
    elif [[ -n $stop ]]; then
        echo "No server of ours runs on port $port."
    fi
    rm -f "$server/pid"
}
if [[ -n $stop ]]; then
    halt
    exit 0
fi

config=$(ours config)
if [[ -z ${OPENCODE_SERVER_PASSWORD:-} ]]; then
    [[ -s $server/password ]] || head -c 24 /dev/urandom | base64 | tr '+/' '-_' >"$server/password"
    OPENCODE_SERVER_PASSWORD=$(cat "$server/password")
    hint="export OPENCODE_SERVER_PASSWORD=\$(cat '$server/password')"
fi
export OPENCODE_SERVER_PASSWORD

# What a running server was started with, without telling it: configuration, plugin, password and keys.
mapfile -t variables < <(grep -o '{env:[^}]*}' <<<"$config" | sed 's/^{env://;s/}$//' | sort -u)
started_with=$({
    echo "$version" "$config"
    cat "$root"/foundry/opencode/*.js
    for name in OPENCODE_SERVER_PASSWORD "${variables[@]}"; do echo "$name=${!name}"; done
} | sha256sum | cut -d' ' -f1)
if running && [[ $(cat "$server/started_with" 2>/dev/null) == "$started_with" ]] && ours check --wait 10 >/dev/null; then
    echo "The server runs already: http://127.0.0.1:$port (process $pid)."
    [[ -z ${hint:-} ]] || echo "Before \`foundry generate\`: $hint"
    exit 0
fi
halt

works() { "$1" --version >/dev/null 2>&1; }
program=${OPENCODE_BIN:-}
find_program() { # the first that runs here: builds for older processors and for musl have names of their own
    for program in "$home/npm-$version"/node_modules/opencode-*/bin/opencode; do
        if [[ -x $program ]] && works "$program"; then return 0; fi
    done
    return 1
}
if [[ -n $program ]]; then
    works "$program" || fail "OPENCODE_BIN=$program does not run"
elif ! find_program; then
    command -v npm >/dev/null || fail "OpenCode is not there, and no npm to install it: install Node.js with npm"
    echo "Installing OpenCode $version into $home"
    npm install --prefix "$home/npm-$version" --ignore-scripts --no-audit --no-fund --loglevel error \
        "opencode-ai@$version" >/dev/null || fail "npm could not install opencode-ai@$version (see above)"
    find_program || fail "opencode-ai@$version has no program that runs on this machine"
fi

printf '%s\n' "$config" >"$server/opencode.json"
# For plugins it installs a package of types, which ours does not use, and until that is done (or its registry has not
# answered for a minute) no session begins. It leaves that alone where it looks installed.
mkdir -p "$server/config/opencode/node_modules"
echo '{"packages": {"": {"dependencies": {"@opencode-ai/plugin": "*"}}}}' >"$server/config/opencode/package-lock.json"
: >"$server/log"
(
    # The server sees nothing of our environment but what it needs.
    keep=" PATH LANG TZ SSL_CERT_FILE SSL_CERT_DIR NODE_EXTRA_CA_CERTS HTTPS_PROXY https_proxy HTTP_PROXY http_proxy"
    keep+=" OPENCODE_SERVER_PASSWORD ${variables[*]} "
    for name in $(compgen -e); do
        [[ $keep == *" $name "* ]] || unset "$name"
    done
    export NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost
    export HOME=$server/home XDG_CONFIG_HOME=$server/config XDG_DATA_HOME=$server/data
    export XDG_STATE_HOME=$server/state XDG_CACHE_HOME=$server/cache
    export OPENCODE_CONFIG=$server/opencode.json OPENCODE_DISABLE_PROJECT_CONFIG=1
    # Sessions live for one question: in memory they need no disk and none outlives the server.
    export OPENCODE_DB=:memory:
    # Keys are in the configuration: without this, it looks for a file of logins at every question.
    export OPENCODE_AUTH_CONTENT={}
    for what in MODELS_FETCH AUTOUPDATE LSP_DOWNLOAD DEFAULT_PLUGINS CLAUDE_CODE EXTERNAL_SKILLS SHARE; do
        export "OPENCODE_DISABLE_$what=1"
    done
    cd "$server/work"
    exec setsid "$program" serve --hostname 127.0.0.1 --port "$port" --log-level WARN \
        >>"$server/log" 2>&1 </dev/null
) &
pid=$!
echo "$pid" >"$server/pid"

if ! answered=$(ours check --wait 60) || ! kill -0 "$pid" 2>/dev/null; then
    tail -n 20 "$server/log" >&2
    halt
    fail "the server did not start as it should (its log: $server/log)"
fi
echo "$started_with" >"$server/started_with"
echo "OpenCode $answered at http://127.0.0.1:$port (process $pid, log: $server/log)"
[[ -z ${hint:-} ]] || echo "Before \`foundry generate\`: $hint"

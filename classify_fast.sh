#!/usr/bin/env bash
# One text to a running classify_api.py, with nothing but curl.
#
#     ./classify_fast.sh "Best worst thing ever"
#     ./classify_fast.sh "Best worst thing ever" finetuned
#     HOWSURE_URL=http://127.0.0.1:9000 ./classify_fast.sh "Best worst thing ever" my_adapter
#
# Prints the JSON answer. HOWSURE_API_KEY, if set, is sent along.
# Exit codes: 0 answered, 1 refused or no server (the last line says why), 2 bad usage.
set -uo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ] || [ "$1" = "-h" ] || [ "$1" = "--help" ]; then
    echo "usage: $0 TEXT [base|finetuned|ADAPTER]" >&2
    exit 2
fi
url="${HOWSURE_URL:-http://127.0.0.1:8000}"
key=()
if [ -n "${HOWSURE_API_KEY:-}" ]; then
    # From a file descriptor: a command line can be read by others on this machine.
    key=(--header @<(printf 'X-API-Key: %s' "$HOWSURE_API_KEY"))
fi
answer=$(curl --silent --show-error --max-time 60 --get "${key[@]}" --write-out '\n%{http_code}' \
    --data-urlencode "text=$1" --data-urlencode "model=${2:-base}" "$url/classify") || {
    echo "error: no answer from $url; start it with: python classify_api.py" >&2
    exit 1
}
printf '%s\n' "${answer%$'\n'*}"
[ "${answer##*$'\n'}" = 200 ]

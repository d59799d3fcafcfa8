#!/usr/bin/env bash
# Is a running classify_api.py well? Asks every address once, with nothing but curl.
#
#     ./test_api.sh                            # http://127.0.0.1:8000
#     ./test_api.sh http://127.0.0.1:9000
#
# HOWSURE_API_KEY, if set, is sent along. Exit codes: 0 all as expected, 1 not.
set -uo pipefail

url="${1:-${HOWSURE_URL:-http://127.0.0.1:8000}}"
failed=0
key=()
if [ -n "${HOWSURE_API_KEY:-}" ]; then
    header=$(mktemp)
    trap 'rm -f "$header"' EXIT
    printf 'X-API-Key: %s' "$HOWSURE_API_KEY" > "$header"
    key=(--header "@$header")
fi

# expect STATUS METHOD ADDRESS [JSON]
expect() {
    local body=()
    [ $# -lt 4 ] || body=(--header 'Content-Type: application/json' --data-binary "$4")
    local status
    status=$(curl --silent --max-time 60 --output /dev/null --write-out '%{http_code}' \
        --request "$2" "${key[@]}" "${body[@]}" "$url$3") || status=none
    if [ "$status" = "$1" ]; then
        echo "ok      $1 $2 $3"
    else
        echo "FAILED  $2 $3: expected $1, got $status"
        failed=1
    fi
}

expect 200 GET /
expect 200 GET /health
expect 200 GET /ready
expect 200 GET /models
expect 200 GET /metrics
expect 200 GET /docs
expect 200 GET /ui
expect 200 GET "/classify?text=Best+worst+thing+ever"
expect 200 POST /classify '{"text": "Best worst thing ever", "model": "base"}'
expect 200 POST /classify/batch '{"texts": ["Good.", "Bad.", ""]}'
expect 200 POST /explain '{"text": "Best worst thing ever", "top_k": 3}'
expect 200 POST /decide '{"text": "Best worst thing ever"}'
expect 200 POST /decide '{"text": "Best worst thing ever", "promise": 0.9}'
expect 422 POST /classify '{"text": ""}'
expect 422 POST /classify '{"texts": 5}'
expect 404 POST /classify '{"text": "Good.", "model": "../base"}'
expect 415 POST /classify
expect 405 DELETE /classify
expect 404 GET /nothing
exit $failed

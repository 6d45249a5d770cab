#!/usr/bin/env bash
# Writes the secrets that docker-compose.secured.yml mounts, one file each under secrets/; existing ones stay.
#
#   scripts/make_secrets.sh              the tokens of administration and of Grafana
#   scripts/make_secrets.sh NAME...      besides, an API key for each named client; printed once, kept as a hash
set -euo pipefail
cd "$(dirname "$0")/.."
umask 077
mkdir -p secrets

random() { head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; }

for name in admin_token grafana_admin_password; do
  if [ ! -s "secrets/$name" ]; then
    random > "secrets/$name"
    # containers run as other users than you, and Compose mounts the file as it is; the folder keeps others out
    chmod 0444 "secrets/$name"
    echo "wrote secrets/$name"
  fi
done

for client in "$@"; do
  if ! [[ $client =~ ^[A-Za-z0-9._-]+$ ]]; then
    echo "a client's name has letters, digits, '.', '_' and '-' only: $client" >&2
    exit 1
  fi
  touch secrets/api_keys
  if grep -qxF "name = \"$client\"" secrets/api_keys; then
    echo "$client has a key already; remove its entry from secrets/api_keys to make another"
    continue
  fi
  key=$(random)
  chmod 0644 secrets/api_keys
  printf '[[key]]\nname = "%s"\nsha256 = "%s"\n\n' "$client" "$(printf %s "$key" | sha256sum | cut -d' ' -f1)" \
    >> secrets/api_keys
  chmod 0444 secrets/api_keys
  echo "key of $client, kept nowhere: $key"
done

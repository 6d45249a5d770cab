#!/usr/bin/env bash
# Writes the secrets that docker-compose.yml mounts, one file each under secrets/; existing ones stay.
set -euo pipefail
cd "$(dirname "$0")/.."
umask 077
mkdir -p secrets
names=(grafana_admin_password)
for name in "${names[@]}"; do
  if [ ! -s "secrets/$name" ]; then
    head -c 24 /dev/urandom | base64 | tr -d '\n' > "secrets/$name"
    # containers run as other users than you, and Compose mounts the file as it is
    chmod 0444 "secrets/$name"
    echo "wrote secrets/$name"
  fi
done

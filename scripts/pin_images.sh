#!/usr/bin/env bash
# Appends to every image tag that the project names (Dockerfile, .env) the digest it has today, so that a
# later build gets the same bytes. Needs docker with buildx and access to the images' registries.
#
#   scripts/pin_images.sh           pin
#   scripts/pin_images.sh --check   fail when one is not pinned
set -euo pipefail
cd "$(dirname "$0")/.."

# every "name:tag" behind ARG …_IMAGE= of the Dockerfile, and behind the …_TAG of .env
references() {
  sed -nE 's/^ARG [A-Z_]+_IMAGE=(.+)$/\1/p' Dockerfile
  sed -nE 's#^PROMETHEUS_TAG=(.+)$#prom/prometheus:\1#p; s#^ALERTMANAGER_TAG=(.+)$#prom/alertmanager:\1#p;
    s#^GRAFANA_TAG=(.+)$#grafana/grafana:\1#p' .env
}

status=0
while read -r reference; do
  case $reference in *@sha256:*) continue ;; esac
  if [ "${1:-}" = --check ]; then
    echo "not pinned: $reference"
    status=1
    continue
  fi
  digest=$(docker buildx imagetools inspect "$reference" --format '{{.Manifest.Digest}}')
  case $digest in sha256:*) ;; *) echo "no digest for $reference: $digest" >&2; exit 1 ;; esac
  tag=${reference##*:}
  # the tag stays, for people; the digest decides
  sed -i -E "s#^(ARG [A-Z_]+_IMAGE=${reference//./\\.})\$#\\1@$digest#" Dockerfile
  sed -i -E "s#^([A-Z]+_TAG=${tag//./\\.})\$#\\1@$digest#" .env
  echo "pinned $reference@$digest"
done < <(references)
exit $status

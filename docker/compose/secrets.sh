#!/bin/sh
# Makes the secrets of compose.yaml, once; what is there stays.
#
# Compose mounts the files as they are, so the containers' users must be able to read them: the directory is what keeps
# others of this machine out.
set -eu
cd "$(dirname "$0")"
[ ! -e secrets ] || { echo "secrets/ is there already" >&2; exit 0; }

random() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }

umask 077
making=$(mktemp -d ./secrets.XXXXXX)
trap 'rm -rf "$making"' EXIT
key=GK$(random 12)
secret=$(random 32)
random 24 >"$making/postgres_password"
random 24 >"$making/seawall_password"
cat >"$making/garage.env" <<END
GARAGE_DEFAULT_ACCESS_KEY=$key
GARAGE_DEFAULT_SECRET_KEY=$secret
GARAGE_DEFAULT_BUCKET=wal
GARAGE_RPC_SECRET=$(random 32)
END
cat >"$making/aws_credentials" <<END
[default]
aws_access_key_id = $key
aws_secret_access_key = $secret
END
chmod 0444 "$making"/*
chmod 0400 "$making/garage.env"
mv "$making" secrets

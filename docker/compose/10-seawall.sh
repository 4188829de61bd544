#!/bin/sh
# Runs once, when the server's image has made a new data directory: the role and the lines it connects by.
set -eu

psql -v ON_ERROR_STOP=1 --username=postgres --dbname=postgres <<'SQL'
\set password `cat /run/secrets/seawall_password`
create role seawall login replication password :'password';
grant pg_monitor to seawall;
SQL

# "all" does not match replication connections.
cat >>"$PGDATA/pg_hba.conf" <<'HBA'
host     replication  seawall      samenet                 scram-sha-256
host     postgres     seawall      samenet                 scram-sha-256
HBA

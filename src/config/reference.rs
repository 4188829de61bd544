//! Owns: the table of all keys. The parser takes names from here, suggestions come from here, and the README's
//! reference is checked against it.
//! Does not own: what a value must look like (`mod.rs`).

/// One key, documented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyDoc {
    /// With `NAME` for the name of a cluster or repository: `clusters.NAME.slot`.
    pub key: &'static str,
    /// Type or unit.
    pub kind: &'static str,
    /// What holds when the key is left out; `None`: it must be given.
    pub default: Option<&'static str>,
    pub effect: &'static str,
    /// As it stands in a configuration file, behind `=`.
    pub example: &'static str,
}

/// The groups of tables a configuration has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    Clusters,
    Repositories,
    Spool,
    Http,
}

impl Group {
    pub const ALL: [Group; 4] = [Group::Clusters, Group::Repositories, Group::Spool, Group::Http];

    pub fn name(self) -> &'static str {
        match self {
            Group::Clusters => "clusters",
            Group::Repositories => "repositories",
            Group::Spool => "spool",
            Group::Http => "http",
        }
    }

    /// Whether there are several tables, each with a name of its own.
    pub fn is_named(self) -> bool {
        matches!(self, Group::Clusters | Group::Repositories)
    }

    /// A key as an error shows it.
    pub fn path(self, name: &str, key: &str) -> String {
        match self.is_named() {
            true => format!("{}.{name}.{key}", self.name()),
            false => format!("{}.{key}", self.name()),
        }
    }

    /// The table's keys, as [`KeyDoc`]s with their last words.
    pub fn keys(self) -> impl Iterator<Item = (&'static str, &'static KeyDoc)> {
        let prefix = if self.is_named() { ".NAME." } else { "." };
        REFERENCE.iter().filter_map(move |doc| {
            let rest = doc.key.strip_prefix(self.name())?.strip_prefix(prefix)?;
            Some((rest, doc))
        })
    }

    /// The keys that are tables themselves.
    pub fn subtables(self) -> impl Iterator<Item = &'static str> {
        self.keys().filter_map(|(key, _)| Some(key.split_once('.')?.0))
    }

    pub fn has_subtable(self, key: &str) -> bool {
        self.below(key).next().is_some()
    }

    /// What such a table holds, in its own line.
    pub fn subtable_example(self, table: &str) -> String {
        let entry = |(entry, doc): (&str, &KeyDoc)| format!("{entry} = {}", doc.example);
        self.below(table).map(entry).collect::<Vec<_>>().join(", ")
    }

    /// The keys in a table within the table, without its name.
    fn below(self, table: &str) -> impl Iterator<Item = (&'static str, &'static KeyDoc)> {
        self.keys().filter_map(move |(key, doc)| Some((key.strip_prefix(table)?.strip_prefix('.')?, doc)))
    }

    pub fn find(self, key: &str) -> Option<(&'static str, &'static KeyDoc)> {
        self.keys().find(|(name, _)| *name == key)
    }

    pub fn nearest(self, key: &str) -> Option<&'static str> {
        nearest(key, self.keys().map(|(name, _)| name))
    }

    /// Keys of the design that this version does not have yet: refused by name, not as typing mistakes.
    pub fn later(self) -> &'static [&'static str] {
        match self {
            Group::Clusters => &["protect", "slot_limit", "backup.differential", "backup.incremental", "verify.drill"],
            Group::Repositories | Group::Spool | Group::Http => &[],
        }
    }
}

/// Top-level tables of later versions.
pub const LATER_TABLES: [&str; 1] = ["alerts"];

/// Every key of this version.
pub fn reference() -> Vec<KeyDoc> {
    REFERENCE.to_vec()
}

/// The candidate most like `word`, if one is like it at all.
pub fn nearest(word: &str, candidates: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let word = word.to_lowercase();
    candidates
        .map(|candidate| (strsim::jaro_winkler(candidate, &word), candidate))
        .filter(|(likeness, _)| *likeness >= 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

const REFERENCE: &[KeyDoc] = &[
    KeyDoc {
        key: "clusters.NAME.postgres",
        kind: "libpq connection string or URI",
        default: Some("\"\": PG* variables and libpq's defaults"),
        effect: "The servers to follow. Keywords, URIs, several hosts, PG* variables, service and password files work \
                 as in libpq; application_name is seawall and connect_timeout 10 s unless given.",
        example: "\"host=db1,db2 user=seawall dbname=postgres target_session_attrs=read-write\"",
    },
    KeyDoc {
        key: "clusters.NAME.postgres_file",
        kind: "absolute path",
        default: Some("none"),
        effect: "Reads the connection string from this file at start, instead of `postgres`; one line end at its end \
                 is ignored.",
        example: "\"/run/secrets/postgres-dsn\"",
    },
    KeyDoc {
        key: "clusters.NAME.password_file",
        kind: "absolute path",
        default: Some("none: the password comes from the connection string, PGPASSWORD or ~/.pgpass"),
        effect: "Reads the password from this file anew at every connect; one line end at its end is ignored.",
        example: "\"/run/secrets/postgres-password\"",
    },
    KeyDoc {
        key: "clusters.NAME.slot",
        kind: "name: a-z, 0-9 and _, at most 63 characters",
        default: Some("\"seawall\""),
        effect: "The physical replication slot that holds WAL on the server until it is archived.",
        example: "\"seawall\"",
    },
    KeyDoc {
        key: "clusters.NAME.repositories",
        kind: "list of repository names",
        default: Some("the only repository, when one is configured"),
        effect: "Where the WAL is stored: in each of them.",
        example: "[\"local\"]",
    },
    KeyDoc {
        key: "clusters.NAME.required",
        kind: "\"all\", \"any\", or a number of repositories",
        default: Some("\"all\""),
        effect: "How many of the repositories must hold a byte before it is acknowledged. One that is not needed never \
                 holds the others up; what it misses is copied to it later.",
        example: "\"all\"",
    },
    KeyDoc {
        key: "clusters.NAME.acknowledge",
        kind: "\"repository\" or \"spool\"",
        default: Some("\"repository\""),
        effect: "What \"flushed\" means to the server: stored durably in the required repositories, or synced to the \
                 local spool ([spool]).",
        example: "\"repository\"",
    },
    KeyDoc {
        key: "clusters.NAME.synchronous",
        kind: "true or false",
        default: Some("as the server says"),
        effect: "Whether the server's commits wait for this archive, as a synchronous standby: WAL is then uploaded \
                 as soon as the upload before it is done. Left out, the server is asked.",
        example: "true",
    },
    KeyDoc {
        key: "clusters.NAME.encrypt_to",
        kind: "list of age recipients (age1…)",
        default: Some("none: not encrypted"),
        effect: "Public keys to which WAL is encrypted before it leaves this machine; whoever holds the identity of \
                 one of them can read it. Names, positions, times and checksums stay readable.",
        example: "[\"age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p\"]",
    },
    KeyDoc {
        key: "clusters.NAME.identity_file",
        kind: "absolute path",
        default: Some("none: encrypted WAL cannot be read here"),
        effect: "Secret keys as age-keygen writes them, for reading what is encrypted: wal-get and restores need it; \
                 an agent that has it compares with it an encrypted object nothing else tells about.",
        example: "\"/etc/seawall/identity.txt\"",
    },
    KeyDoc {
        key: "clusters.NAME.tail_interval",
        kind: "duration, 100ms to 1h",
        default: Some("\"5s\""),
        effect: "How long a received byte may wait before its upload starts. Shorter loses less with the primary, and \
                 costs more objects and requests.",
        example: "\"5s\"",
    },
    KeyDoc {
        key: "clusters.NAME.shutdown_grace",
        kind: "duration, 0s to 1h",
        default: Some("\"10s\""),
        effect: "How long a stopping server may be kept waiting for its last WAL to be stored; the rest stays in the \
                 slot.",
        example: "\"10s\"",
    },
    KeyDoc {
        key: "clusters.NAME.memory",
        kind: "size, at least 8MiB",
        default: Some("\"32MiB\""),
        effect: "Memory for WAL that is received and not yet stored. When it is full, reading pauses and the slot \
                 holds the rest on the server.",
        example: "\"32MiB\"",
    },
    KeyDoc {
        key: "clusters.NAME.backup.automatic",
        kind: "true or false",
        default: Some("true"),
        effect: "Whether the agent takes base backups by itself: the first one as soon as the stream runs, one \
                 whenever the archive has a gap behind the last one, and those of the schedule below.",
        example: "true",
    },
    KeyDoc {
        key: "clusters.NAME.backup.full",
        kind: "cron line, \"every DURATION\" or \"after SIZE\"",
        default: Some("none: no schedule"),
        effect: "When full backups are taken: five cron fields (minute, hour, day, month, weekday), an interval from \
                 1min on, or an amount of WAL from 1MiB on. What was missed is caught up on once.",
        example: "\"0 2 * * 0\"",
    },
    KeyDoc {
        key: "clusters.NAME.backup.timezone",
        kind: "name of a time zone",
        default: Some("\"UTC\""),
        effect: "What cron lines mean by an hour, and retention by a day.",
        example: "\"Europe/Berlin\"",
    },
    KeyDoc {
        key: "clusters.NAME.backup.jitter",
        kind: "duration, 0s to 1d",
        default: Some("\"0s\""),
        effect: "How much later than its time a scheduled backup may begin, different for each cluster, so that many \
                 of one schedule do not begin together.",
        example: "\"10min\"",
    },
    KeyDoc {
        key: "clusters.NAME.backup.max_rate",
        kind: "size, 32KiB to 1GiB, each second",
        default: Some("none: as fast as it goes"),
        effect: "How much the server may send of its files in a second, to leave its disks to others.",
        example: "\"50MiB\"",
    },
    KeyDoc {
        key: "clusters.NAME.backup.checkpoint",
        kind: "\"fast\" or \"spread\"",
        default: Some("\"fast\""),
        effect: "A backup begins with a checkpoint: at once, or spread over the server's checkpoint_completion_target.",
        example: "\"spread\"",
    },
    KeyDoc {
        key: "clusters.NAME.backup.label",
        kind: "one line of text",
        default: Some("none"),
        effect: "What backups are labelled where `seawall backup --label` says nothing else.",
        example: "\"nightly\"",
    },
    KeyDoc {
        key: "clusters.NAME.backup.from",
        kind: "libpq connection string or URI",
        default: Some("the server WAL is streamed from"),
        effect: "A standby whose files are copied instead; WAL is streamed from the primary all the same. The \
                 cluster's password_file holds for it too.",
        example: "\"host=db2 user=seawall\"",
    },
    KeyDoc {
        key: "clusters.NAME.backup.compression",
        kind: "\"none\", \"gzip\", \"lz4\" or \"zstd\"",
        default: Some("\"none\""),
        effect: "How the server compresses what it sends (15 and later, as it was built), for a thin network. What is \
                 stored is compressed here, with zstd.",
        example: "\"lz4\"",
    },
    KeyDoc {
        key: "clusters.NAME.backup.manifest_checksums",
        kind: "\"crc32c\", \"sha224\", \"sha256\", \"sha384\" or \"sha512\"",
        default: Some("\"crc32c\""),
        effect: "Of every file, in the backup's manifest; calculated by the server, which SHA costs far more.",
        example: "\"sha256\"",
    },
    KeyDoc {
        key: "clusters.NAME.retention.automatic",
        kind: "true or false",
        default: Some("true"),
        effect: "Whether the agent removes what no rule below keeps any more, after each good backup. Without any rule \
                 nothing is ever removed.",
        example: "true",
    },
    KeyDoc {
        key: "clusters.NAME.retention.window",
        kind: "duration, longer than 0s",
        default: Some("none"),
        effect: "Every instant of this long ago until now stays restorable.",
        example: "\"14d\"",
    },
    KeyDoc {
        key: "clusters.NAME.retention.count",
        kind: "number, 1 or more",
        default: Some("none"),
        effect: "How many of the newest full backups are kept.",
        example: "4",
    },
    KeyDoc {
        key: "clusters.NAME.retention.gfs.daily",
        kind: "number, 1 or more",
        default: Some("none"),
        effect: "Keeps the newest backup of each of so many days that have one.",
        example: "7",
    },
    KeyDoc {
        key: "clusters.NAME.retention.gfs.weekly",
        kind: "number, 1 or more",
        default: Some("none"),
        effect: "The same of weeks, which begin on Monday.",
        example: "4",
    },
    KeyDoc {
        key: "clusters.NAME.retention.gfs.monthly",
        kind: "number, 1 or more",
        default: Some("none"),
        effect: "The same of months.",
        example: "12",
    },
    KeyDoc {
        key: "clusters.NAME.retention.gfs.yearly",
        kind: "number, 1 or more",
        default: Some("none"),
        effect: "The same of years.",
        example: "3",
    },
    KeyDoc {
        key: "clusters.NAME.retention.full",
        kind: "duration, longer than 0s",
        default: Some("none"),
        effect: "Every full backup younger than this is kept.",
        example: "\"30d\"",
    },
    KeyDoc {
        key: "clusters.NAME.retention.differential",
        kind: "duration, longer than 0s",
        default: Some("none"),
        effect: "Every differential backup younger than this is kept, with what it builds on.",
        example: "\"14d\"",
    },
    KeyDoc {
        key: "clusters.NAME.retention.incremental",
        kind: "duration, longer than 0s",
        default: Some("none"),
        effect: "Every incremental backup younger than this is kept, with what it builds on.",
        example: "\"7d\"",
    },
    KeyDoc {
        key: "clusters.NAME.retention.wal",
        kind: "duration, longer than 0s",
        default: Some("none: all WAL from the oldest kept backup on"),
        effect: "Backups older than this keep only the WAL they need themselves: they restore to their own end. Not \
                 shorter than the window.",
        example: "\"14d\"",
    },
    KeyDoc {
        key: "clusters.NAME.verify.quick",
        kind: "cron line or \"every DURATION\"",
        default: Some("none: not by itself"),
        effect: "When the agent holds what the archive lists against what is there, both ways.",
        example: "\"every 1d\"",
    },
    KeyDoc {
        key: "clusters.NAME.verify.sample",
        kind: "cron line or \"every DURATION\"",
        default: Some("none: not by itself"),
        effect: "When it reads a part of all objects back and verifies them.",
        example: "\"0 4 * * 1-5\"",
    },
    KeyDoc {
        key: "clusters.NAME.verify.full",
        kind: "cron line or \"every DURATION\"",
        default: Some("none: not by itself"),
        effect: "When it reads every object back and follows every chain of records.",
        example: "\"0 4 * * 6\"",
    },
    KeyDoc {
        key: "clusters.NAME.verify.sample_percent",
        kind: "number, 1 to 100",
        default: Some("5"),
        effect: "How much of it a sample reads.",
        example: "5",
    },
    KeyDoc {
        key: "clusters.NAME.verify.max_rate",
        kind: "size, at least 32KiB, each second",
        default: Some("none: as fast as it goes"),
        effect: "How much verifying may read in a second, to leave store and network to others.",
        example: "\"50MiB\"",
    },
    KeyDoc {
        key: "repositories.NAME.url",
        kind: "URL: file:///absolute/path or s3://bucket/prefix",
        default: None,
        effect: "Where the repository is: a directory, or S3 and what speaks its protocol. The keys below are for \
                 S3 only; credentials come from the AWS sources: environment, profile, web identity, instance.",
        example: "\"s3://bucket/prefix\"",
    },
    KeyDoc {
        key: "repositories.NAME.endpoint",
        kind: "URL: https://host[:port]",
        default: Some("AWS's own, or AWS_ENDPOINT_URL"),
        effect: "A store other than AWS.",
        example: "\"https://minio.example.com:9000\"",
    },
    KeyDoc {
        key: "repositories.NAME.region",
        kind: "name of a region",
        default: Some("AWS_REGION, or the profile's"),
        effect: "The bucket's region.",
        example: "\"eu-central-1\"",
    },
    KeyDoc {
        key: "repositories.NAME.path_style",
        kind: "true or false",
        default: Some("true where there is an endpoint"),
        effect: "Puts the bucket's name into the path instead of the host's name.",
        example: "true",
    },
    KeyDoc {
        key: "repositories.NAME.profile",
        kind: "name of a profile",
        default: Some("AWS_PROFILE, or \"default\""),
        effect: "Which profile of the AWS configuration files holds the credentials.",
        example: "\"backup\"",
    },
    KeyDoc {
        key: "repositories.NAME.ca_file",
        kind: "absolute path",
        default: Some("the system's authorities"),
        effect: "PEM file of the authorities that may sign the endpoint's certificate.",
        example: "\"/etc/seawall/store-ca.pem\"",
    },
    KeyDoc {
        key: "repositories.NAME.storage_class.wal",
        kind: "storage class as S3 names it",
        default: Some("the bucket's"),
        effect: "For sealed segments; small and short-lived objects always get the bucket's. It must be one whose \
                 objects can be read at once.",
        example: "\"STANDARD_IA\"",
    },
    KeyDoc {
        key: "repositories.NAME.storage_class.backup",
        kind: "storage class as S3 names it",
        default: Some("the bucket's"),
        effect: "For volumes of base backups.",
        example: "\"STANDARD_IA\"",
    },
    KeyDoc {
        key: "repositories.NAME.sse",
        kind: "\"s3\", \"kms\" or \"kms:KEY\"",
        default: Some("as the bucket says"),
        effect: "Encryption by the store: with its own key, with the account's KMS key, or with the KMS key of this \
                 id or ARN. `encrypt_to` is the one that needs no trust in the store.",
        example: "\"kms:alias/wal\"",
    },
    KeyDoc {
        key: "repositories.NAME.checksum",
        kind: "\"crc32\" or \"none\"",
        default: Some("\"crc32\""),
        effect: "Which checksum the store is given with every object, to verify; \"none\" for stores that reject it.",
        example: "\"none\"",
    },
    KeyDoc {
        key: "repositories.NAME.single_writer",
        kind: "true or false",
        default: Some("false"),
        effect: "Accepts a store without conditional writes. You vouch that nothing but this one agent writes there: \
                 such a store cannot keep two writers apart.",
        example: "true",
    },
    KeyDoc {
        key: "spool.path",
        kind: "absolute path",
        default: None,
        effect: "A local directory for WAL the repositories do not take as fast as the server writes it; one \
                 subdirectory for each cluster. Without [spool] the slot holds it on the server.",
        example: "\"/var/lib/seawall/spool\"",
    },
    KeyDoc {
        key: "spool.limit",
        kind: "size, at least 64MiB",
        default: Some("\"10GiB\""),
        effect: "How much the spool may hold; every cluster has an equal share of it.",
        example: "\"10GiB\"",
    },
    KeyDoc {
        key: "http.listen",
        kind: "IP address and port",
        default: Some("\"127.0.0.1:9187\""),
        effect: "Where /metrics, /status, /protected, /healthz and /readyz are served, for reading only. Without \
                 [http] nothing listens.",
        example: "\"127.0.0.1:9187\"",
    },
    KeyDoc {
        key: "http.token_file",
        kind: "absolute path",
        default: Some("none: nobody is asked"),
        effect: "Holds the bearer token that everything but /healthz and /readyz asks for; one line end at its end is \
                 ignored.",
        example: "\"/run/secrets/seawall-http-token\"",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_belongs_to_a_group_and_is_not_also_later() {
        let grouped: usize = Group::ALL.iter().map(|group| group.keys().count()).sum();
        assert_eq!(grouped, reference().len());
        for group in Group::ALL {
            assert!(group.later().iter().all(|key| group.find(key).is_none()));
        }
    }

    #[test]
    fn nearest_finds_typing_mistakes_only() {
        assert_eq!(Group::Clusters.nearest("solt"), Some("slot"));
        assert_eq!(Group::Clusters.nearest("tail-interval"), Some("tail_interval"));
        assert_eq!(Group::Clusters.nearest("xyzzy"), None);
        assert_eq!(Group::Repositories.nearest("uri"), Some("url"));
    }
}

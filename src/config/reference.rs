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
}

impl Group {
    pub const ALL: [Group; 2] = [Group::Clusters, Group::Repositories];

    pub fn name(self) -> &'static str {
        match self {
            Group::Clusters => "clusters",
            Group::Repositories => "repositories",
        }
    }

    /// The table's keys, as [`KeyDoc`]s with their last word.
    pub fn keys(self) -> impl Iterator<Item = (&'static str, &'static KeyDoc)> {
        REFERENCE.iter().filter_map(move |doc| {
            let rest = doc.key.strip_prefix(self.name())?.strip_prefix(".NAME.")?;
            Some((rest, doc))
        })
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
            Group::Clusters => &[
                "required",
                "protect",
                "slot_limit",
                "synchronous",
                "encrypt_to",
                "identity_file",
                "backup",
                "retention",
                "verify",
            ],
            Group::Repositories => {
                &["endpoint", "region", "path_style", "storage_class", "sse", "checksum", "single_writer"]
            }
        }
    }
}

/// Top-level tables of later versions.
pub const LATER_TABLES: [&str; 3] = ["spool", "http", "alerts"];

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
        kind: "list with one repository name",
        default: Some("the only repository, when one is configured"),
        effect: "Where the WAL is stored. Several repositories are not available in this version.",
        example: "[\"local\"]",
    },
    KeyDoc {
        key: "clusters.NAME.acknowledge",
        kind: "\"repository\"",
        default: Some("\"repository\""),
        effect: "What \"flushed\" means to the server: stored durably in the repository. \"spool\" is not available in \
                 this version.",
        example: "\"repository\"",
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
        key: "repositories.NAME.url",
        kind: "URL: file:///absolute/path",
        default: None,
        effect: "Where the repository is. s3:// is not available in this version.",
        example: "\"file:///var/lib/seawall\"",
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

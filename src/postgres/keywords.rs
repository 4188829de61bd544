//! Owns: libpq's connection keywords, their variables, and how far each is built here.
//! Does not own: how their values are read (`conninfo`).

/// One keyword of libpq.
pub(super) struct Keyword {
    pub name: &'static str,
    /// The variable that stands in for it.
    pub variable: Option<&'static str>,
    pub support: Support,
}

pub(super) enum Support {
    Used,
    /// Only these values (and the empty one) are accepted: they ask for nothing that is missing here.
    /// Any other is refused with a hint, never ignored.
    Only {
        accepted: &'static [&'static str],
        instead: &'static str,
    },
}

const fn used(name: &'static str, variable: Option<&'static str>) -> Keyword {
    Keyword { name, variable, support: Support::Used }
}

const fn only(
    name: &'static str,
    variable: Option<&'static str>,
    accepted: &'static [&'static str],
    instead: &'static str,
) -> Keyword {
    Keyword { name, variable, support: Support::Only { accepted, instead } }
}

const NO_GSS: &str = "use a password (SCRAM) or a Unix socket with peer authentication";
const NO_PASSPHRASE: &str =
    "store the key without a passphrase, readable by this user only: openssl pkey -in OLD -out NEW";

/// Every keyword of libpq 18, the used ones first.
pub(super) const KEYWORDS: &[Keyword] = &[
    used("host", Some("PGHOST")),
    used("hostaddr", Some("PGHOSTADDR")),
    used("port", Some("PGPORT")),
    used("user", Some("PGUSER")),
    // PGPASSWORD is read at every login, not when the string is parsed.
    used("password", None),
    used("passfile", Some("PGPASSFILE")),
    used("dbname", Some("PGDATABASE")),
    used("sslmode", Some("PGSSLMODE")),
    used("sslnegotiation", Some("PGSSLNEGOTIATION")),
    used("sslrootcert", Some("PGSSLROOTCERT")),
    used("sslcert", Some("PGSSLCERT")),
    used("sslkey", Some("PGSSLKEY")),
    used("sslcertmode", Some("PGSSLCERTMODE")),
    used("sslcrl", Some("PGSSLCRL")),
    used("sslcrldir", Some("PGSSLCRLDIR")),
    used("sslsni", Some("PGSSLSNI")),
    used("ssl_min_protocol_version", Some("PGSSLMINPROTOCOLVERSION")),
    used("ssl_max_protocol_version", Some("PGSSLMAXPROTOCOLVERSION")),
    used("channel_binding", Some("PGCHANNELBINDING")),
    used("require_auth", Some("PGREQUIREAUTH")),
    used("application_name", Some("PGAPPNAME")),
    used("fallback_application_name", None),
    used("options", Some("PGOPTIONS")),
    used("connect_timeout", Some("PGCONNECT_TIMEOUT")),
    used("target_session_attrs", Some("PGTARGETSESSIONATTRS")),
    used("keepalives", None),
    used("keepalives_idle", None),
    used("keepalives_interval", None),
    used("keepalives_count", None),
    used("tcp_user_timeout", None),
    used("service", Some("PGSERVICE")),
    used("servicefile", Some("PGSERVICEFILE")),
    only("client_encoding", None, &["UTF8", "utf8", "UTF-8", "utf-8"], "leave it out: seawall speaks UTF8"),
    only("replication", None, &[], "leave it out: seawall opens the replication session itself"),
    only("load_balance_hosts", Some("PGLOADBALANCEHOSTS"), &["disable"], "leave it out: hosts are tried in order"),
    only("gssencmode", Some("PGGSSENCMODE"), &["disable", "prefer"], NO_GSS),
    only("krbsrvname", None, &[], NO_GSS),
    only("gsslib", None, &[], NO_GSS),
    only("gssdelegation", None, &["0"], NO_GSS),
    only("requirepeer", Some("PGREQUIREPEER"), &[], "leave it out, or connect by TCP"),
    only("sslcompression", Some("PGSSLCOMPRESSION"), &["0"], "leave it out"),
    only("sslpassword", None, &[], NO_PASSPHRASE),
    only("sslkeylogfile", None, &[], "leave it out: session keys are never written"),
    only("min_protocol_version", Some("PGMINPROTOCOLVERSION"), &["3.0"], "leave it out: protocol 3.0 is spoken"),
    only("max_protocol_version", Some("PGMAXPROTOCOLVERSION"), &["3.0", "latest"], "protocol 3.0 is spoken"),
    only("scram_client_key", None, &[], "use a password"),
    only("scram_server_key", None, &[], "use a password"),
    only("oauth_issuer", None, &[], "use a password"),
    only("oauth_client_id", None, &[], "use a password"),
    only("oauth_client_secret", None, &[], "use a password"),
    only("oauth_scope", None, &[], "use a password"),
];

pub(super) fn find(name: &str) -> Option<&'static Keyword> {
    KEYWORDS.iter().find(|keyword| keyword.name == name)
}

/// The known keyword most like `name`, if one is like it at all.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    KEYWORDS
        .iter()
        .map(|keyword| (strsim::jaro_winkler(keyword.name, &name.to_lowercase()), keyword.name))
        .filter(|(likeness, _)| *likeness >= 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_typos_find_theirs() {
        for (i, keyword) in KEYWORDS.iter().enumerate() {
            assert!(KEYWORDS[i + 1..].iter().all(|other| other.name != keyword.name), "{}", keyword.name);
        }
        assert_eq!(nearest("pasword"), Some("password"));
        assert_eq!(nearest("databse"), None);
        assert_eq!(nearest("hots"), Some("host"));
        assert_eq!(nearest("SSLMODE"), Some("sslmode"));
    }
}

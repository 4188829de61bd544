//! Owns: configuration that lives outside the data directory (Debian's `/etc/postgresql/…`), read through SQL where the
//! role may: a base backup does not hold it.
//! Does not own: storing it (`backup`).
//!
//! What may not be read is left out; a backup is whole without it.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::error::Failure;
use crate::replication::{Connection, Dial, Login, QueryResult};

/// A larger file is no configuration anybody wrote.
const FILE_BYTES_MAX: usize = 1 << 20;
/// More includes than that are left out.
const FILES_MAX: usize = 256;

/// One file of the server's, outside its data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFile {
    /// Relative, of plain components.
    pub name: String,
    /// On the server, absolute.
    pub path: String,
    pub content: Bytes,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captured {
    pub files: Vec<ServerFile>,
    /// Why not all of it could be read, for people.
    pub missing: Option<String>,
}

/// Reads what the role may read, in a session that ends with it.
pub async fn capture(dialer: &dyn Dial, login: &Login) -> Result<Captured, Failure> {
    let mut connection = Connection::open(dialer, login).await?;
    let captured = read(&mut connection).await;
    connection.close().await;
    captured
}

async fn read(connection: &mut Connection) -> Result<Captured, Failure> {
    let settings: BTreeMap<String, String> = pairs(&connection.query(PLACES).await?).collect();
    let Some(data_directory) = settings.get("data_directory").filter(|path| !path.is_empty()) else {
        let missing = "the role may not see where the server's configuration is (GRANT pg_read_all_settings)";
        return Ok(Captured { files: Vec::new(), missing: Some(missing.to_string()) });
    };
    let mut paths: BTreeSet<String> =
        settings.iter().filter(|(name, _)| *name != "data_directory").map(|(_, path)| path.clone()).collect();
    for query in INCLUDED {
        // Not every version has each, and not every role may see it: what the settings name is the most of it.
        if let Ok(answer) = connection.query(query).await {
            paths.extend((0..answer.rows.len()).filter_map(|row| answer.text(row, 0).map(str::to_string)));
        }
    }
    paths.retain(|path| is_outside(path, data_directory));
    let base = settings.get("config_file").and_then(|path| Some(path.rsplit_once('/')?.0)).unwrap_or_default();
    let mut captured = Captured::default();
    let mut names = BTreeSet::new();
    for path in paths.into_iter().take(FILES_MAX) {
        let Some(name) = name_of(&path, base).filter(|name| names.insert(name.clone())) else { continue };
        match content_of(connection, &path).await {
            Ok(Some(content)) => captured.files.push(ServerFile { name, path, content }),
            Ok(None) => captured.missing = Some(format!("{path} is larger than {FILE_BYTES_MAX} bytes")),
            Err(failure) => captured.missing = Some(format!("{path} cannot be read: {failure}")),
        }
    }
    Ok(captured)
}

/// Settings only those see who may read all of them.
const PLACES: &str = "SELECT name, setting FROM pg_catalog.pg_settings \
    WHERE name IN ('data_directory', 'config_file', 'hba_file', 'ident_file') AND setting IS NOT NULL";

/// What those include.
const INCLUDED: [&str; 4] = [
    "SELECT DISTINCT sourcefile FROM pg_catalog.pg_settings WHERE sourcefile IS NOT NULL",
    "SELECT DISTINCT sourcefile FROM pg_catalog.pg_file_settings",
    "SELECT DISTINCT file_name FROM pg_catalog.pg_hba_file_rules WHERE file_name IS NOT NULL",
    "SELECT DISTINCT file_name FROM pg_catalog.pg_ident_file_mappings WHERE file_name IS NOT NULL",
];

/// `None`: too large.
async fn content_of(connection: &mut Connection, path: &str) -> Result<Option<Bytes>, Failure> {
    let limit = FILE_BYTES_MAX + 1;
    let quoted = path.replace('\'', "''");
    let query = format!("SELECT pg_catalog.encode(pg_catalog.pg_read_binary_file('{quoted}', 0, {limit}), 'hex')");
    let answer = connection.query(&query).await?;
    let content = answer.text(0, 0).and_then(from_hex).unwrap_or_default();
    Ok((content.len() <= FILE_BYTES_MAX).then(|| content.into()))
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    text.as_bytes().chunks(2).map(|pair| Some(digit(pair[0])? << 4 | digit(*pair.get(1)?)?)).collect()
}

fn pairs(answer: &QueryResult) -> impl Iterator<Item = (String, String)> {
    (0..answer.rows.len()).filter_map(|row| Some((answer.text(row, 0)?.to_string(), answer.text(row, 1)?.to_string())))
}

/// Absolute, and a backslash would need other quotes on other servers.
fn is_outside(path: &str, data_directory: &str) -> bool {
    let below = path.strip_prefix(data_directory.trim_end_matches('/'));
    path.starts_with('/') && !path.contains('\\') && !below.is_some_and(|rest| rest.starts_with('/'))
}

/// Relative to where the main file is, or to the root; `None` where that is no plain name.
fn name_of(path: &str, base: &str) -> Option<String> {
    let below = path.strip_prefix(base).and_then(|rest| rest.strip_prefix('/')).filter(|_| !base.is_empty());
    let name = below.unwrap_or(path.trim_start_matches('/'));
    let is_plain = |part: &str| !matches!(part, "" | "." | "..") && !part.chars().any(char::is_control);
    name.split('/').all(is_plain).then(|| name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_the_data_directory_is_in_the_backup() {
        let data = "/var/lib/postgresql/18/main";
        assert!(is_outside("/etc/postgresql/18/main/pg_hba.conf", data));
        assert!(is_outside("/var/lib/postgresql/18/main2/x.conf", data));
        for path in ["/var/lib/postgresql/18/main/postgresql.auto.conf", "postgresql.conf", "/etc/a\\b", ""] {
            assert!(!is_outside(path, data), "{path}");
        }
    }

    #[test]
    fn names_are_relative_and_plain() {
        let base = "/etc/postgresql/18/main";
        assert_eq!(name_of("/etc/postgresql/18/main/conf.d/a.conf", base).as_deref(), Some("conf.d/a.conf"));
        assert_eq!(name_of("/etc/ident/pg_ident.conf", base).as_deref(), Some("etc/ident/pg_ident.conf"));
        assert_eq!(name_of("/etc/../x", base), None);
        assert_eq!(name_of("/etc//x", base), None);
    }

    #[test]
    fn hexadecimal_is_read_or_refused() {
        assert_eq!(from_hex("00ff4A"), Some(vec![0, 255, 0x4A]));
        assert_eq!((from_hex("0"), from_hex("0g"), from_hex("")), (None, None, Some(vec![])));
    }
}

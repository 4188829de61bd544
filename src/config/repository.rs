//! Owns: what `[repositories.NAME]` may say: where a repository is, and what is asked of an S3 store.
//! Does not own: how it is reached (`repository`).

use std::net::IpAddr;
use std::path::PathBuf;

use super::file::Table;
use super::reference::Group;
use super::section::Section;
use super::{ConfigError, Location, RepositoryConfig};
use crate::repository::s3::{Checksum, S3Options, ServerSideEncryption, StorageClasses};

/// Bytes of a prefix: S3 takes keys of 1024, and the longest name we put behind it has fewer than 300.
const PREFIX_BYTES_MAX: usize = 512;
/// Objects of these classes cannot be read before somebody has had them restored.
const COLD_CLASSES: [&str; 2] = ["GLACIER", "DEEP_ARCHIVE"];

pub(super) fn check(name: &str, table: &Table) -> Result<RepositoryConfig, ConfigError> {
    let section = Section { group: Group::Repositories, name, table };
    let Some(url) = section.text("url")? else {
        return Err(ConfigError::Missing { key: section.key("url"), example: "\"file:///var/lib/seawall\"".into() });
    };
    Ok(RepositoryConfig { name: name.to_string(), url: url.to_string(), location: location(&section, url)? })
}

fn location(section: &Section<'_>, url: &str) -> Result<Location, ConfigError> {
    const SCHEMES_LATER: [&str; 6] = ["gs", "az", "azure", "http", "https", "sftp"];
    match url.split_once("://") {
        Some(("s3", place)) => Ok(Location::S3(s3(section, url, place)?)),
        Some((scheme, _)) if SCHEMES_LATER.contains(&scheme) => {
            Err(section.not_available("url", format!("a repository at {scheme}:// is")))
        }
        _ => {
            let only_s3 = section.table.keys().find(|key| **key != "url");
            match (local(section, url)?, only_s3) {
                (_, Some(key)) => Err(section.needs(key, section.key(key), "an s3:// url")),
                (path, None) => Ok(Location::Local(path)),
            }
        }
    }
}

/// `file:///absolute/path`, percent-encoding allowed.
fn local(section: &Section<'_>, url: &str) -> Result<PathBuf, ConfigError> {
    const EXPECTED: &str = "file:// and an absolute path (three slashes), such as \"file:///var/lib/seawall\", or \
                            s3://bucket/prefix";
    let wrong = || section.invalid("url", Some(url), EXPECTED);
    let path = url.strip_prefix("file://").ok_or_else(wrong)?;
    let path = percent_encoding::percent_decode_str(path).decode_utf8().map_err(|_| wrong())?;
    // "?", "#" and ".." would mean something else to the next reader of the URL.
    let odd = path.contains('\0') || url.contains(['?', '#']) || path.split('/').any(|part| part == "..");
    if !path.starts_with('/') || path.trim_matches('/').is_empty() || odd {
        return Err(wrong());
    }
    Ok(PathBuf::from(path.as_ref()))
}

/// `bucket`, `bucket/prefix`.
fn s3(section: &Section<'_>, url: &str, place: &str) -> Result<S3Options, ConfigError> {
    const EXPECTED: &str = "s3://bucket or s3://bucket/prefix: a bucket of 3 to 63 letters, digits, \".\", \"-\" and \
                            \"_\"; a prefix of the same and \"/\", \"!\", \"+\", \"=\", \",\", \"(\", \")\"; \
                            credentials come from the environment or a profile";
    let wrong = || section.invalid("url", Some(url), EXPECTED);
    let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
    let in_bucket = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(in_bucket) {
        return Err(wrong());
    }
    let prefix = prefix.trim_end_matches('/');
    let in_prefix = |byte: u8| in_bucket(byte) || b"/!+=,()".contains(&byte);
    let is_part = |part: &str| !part.is_empty() && part != "." && part != "..";
    let is_clean = prefix.is_empty() || prefix.split('/').all(is_part);
    if prefix.len() > PREFIX_BYTES_MAX || !prefix.bytes().all(in_prefix) || !is_clean {
        return Err(wrong());
    }
    let region = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let profile = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
    Ok(S3Options {
        bucket: bucket.to_string(),
        prefix: prefix.to_string(),
        endpoint: endpoint(section)?,
        region: section.word("region", region, "a region's name, such as \"eu-central-1\"")?,
        path_style: section.flag("path_style")?,
        profile: section.word("profile", profile, "the name of a profile in the AWS configuration files")?,
        ca_file: section.path("ca_file")?,
        storage_class: StorageClasses {
            wal: wal_class(section)?,
            backup: storage_class(section, "storage_class.backup")?,
        },
        sse: sse(section)?,
        checksum: match section.text("checksum")? {
            None | Some("crc32") => Checksum::Crc32,
            Some("none") => Checksum::None,
            Some(other) => return Err(section.invalid("checksum", Some(other), "\"crc32\" or \"none\"")),
        },
        single_writer: section.flag("single_writer")?.unwrap_or(false),
    })
}

/// `http(s)://host[:port]`: no path, no user, no query.
fn endpoint(section: &Section<'_>) -> Result<Option<String>, ConfigError> {
    const KEY: &str = "endpoint";
    const EXPECTED: &str = "https://host or https://host:port (or http://), without a path";
    let Some(text) = section.text(KEY)? else { return Ok(None) };
    let text = text.trim_end_matches('/');
    match host_and_port(text) {
        Some((host, port)) if is_host(host) && port.is_none_or(is_port) => Ok(Some(text.to_string())),
        _ => Err(section.invalid(KEY, Some(text), EXPECTED)),
    }
}

fn host_and_port(endpoint: &str) -> Option<(&str, Option<&str>)> {
    let authority = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"))?;
    if let Some(rest) = authority.strip_prefix('[') {
        let (host, port) = rest.split_once(']')?;
        return match port.strip_prefix(':') {
            None if port.is_empty() => Some((host, None)),
            port => Some((host, Some(port?))),
        };
    }
    match authority.split_once(':') {
        None => Some((authority, None)),
        Some((host, port)) => Some((host, Some(port))),
    }
}

fn is_host(host: &str) -> bool {
    let in_name = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    !host.is_empty() && (host.bytes().all(in_name) || host.parse::<IpAddr>().is_ok())
}

fn is_port(port: &str) -> bool {
    port.parse::<u16>().is_ok_and(|port| port > 0)
}

/// Whether requests, and what they carry, can be read by whoever sees the network.
pub(super) fn is_plain_beyond_loopback(endpoint: &str) -> bool {
    let Some((host, _)) = host_and_port(endpoint) else { return false };
    let is_loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    endpoint.starts_with("http://") && !is_loopback
}

fn storage_class(section: &Section<'_>, key: &str) -> Result<Option<String>, ConfigError> {
    let allowed = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    section.word(key, allowed, "a storage class as S3 names it, such as \"STANDARD_IA\"")
}

/// WAL is compared with what is stored, and restored at any moment.
fn wal_class(section: &Section<'_>) -> Result<Option<String>, ConfigError> {
    const KEY: &str = "storage_class.wal";
    match storage_class(section, KEY)? {
        Some(class) if COLD_CLASSES.contains(&class.as_str()) => {
            let expected = "a class whose objects can be read at once, such as \"STANDARD_IA\" or \"GLACIER_IR\"";
            Err(section.invalid(KEY, Some(&class), expected))
        }
        class => Ok(class),
    }
}

fn sse(section: &Section<'_>) -> Result<Option<ServerSideEncryption>, ConfigError> {
    const EXPECTED: &str = "\"s3\", \"kms\", or \"kms:\" and the id or ARN of a key";
    match section.text("sse")? {
        None => Ok(None),
        Some("s3") => Ok(Some(ServerSideEncryption::S3)),
        Some("kms") => Ok(Some(ServerSideEncryption::Kms { key: None })),
        Some(other) => match other.strip_prefix("kms:").filter(|key| !key.is_empty()) {
            Some(key) if key.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Ok(Some(ServerSideEncryption::Kms { key: Some(key.to_string()) }))
            }
            _ => Err(section.invalid("sse", Some(other), EXPECTED)),
        },
    }
}

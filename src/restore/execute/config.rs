//! Owns: configuration the source kept outside its data directory: what becomes of it in the copy, and how the copy is
//! started.
//! Does not own: postgresql.auto.conf (`settings.rs`), reading the stored files (`copies.rs`).
//!
//! Debian keeps `/etc/postgresql/<version>/<cluster>/postgresql.conf`, which names its data directory. A copy with that
//! configuration at another place would open the data of the source. So where the original configuration stands and
//! names this very directory, it is used; otherwise the captured files go into the copy, pointed at the copy.

use std::path::{Path, PathBuf};

use super::members;
use super::settings::{quoted, shell_word};
use crate::catalog::backup::ConfigEntry;

pub const MAIN: &str = "postgresql.conf";
const HBA: &str = "pg_hba.conf";
const IDENT: &str = "pg_ident.conf";

/// What becomes of the captured files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Configuration {
    /// It came with the data directory.
    Inside,
    /// The original is here and is this directory's: `pg_ctlcluster`, or `-c config_file=…`.
    Original(PathBuf),
    /// The captured files go into the data directory.
    Captured,
    /// The source kept it outside, and it could not be read.
    Nowhere,
}

/// `original` is the text of the file at the main entry's path, if there is one on this machine.
pub fn decide(entries: &[ConfigEntry], is_inside: bool, original: Option<&[u8]>, pgdata: &Path) -> Configuration {
    if is_inside {
        return Configuration::Inside;
    }
    let Some(main) = entries.iter().find(|entry| entry.name == MAIN) else { return Configuration::Nowhere };
    match original.and_then(data_directory) {
        Some(named) if same_place(&named, pgdata) => Configuration::Original(PathBuf::from(&main.path)),
        _ => Configuration::Captured,
    }
}

/// Whether a captured file may lie in the data directory under its name: it is configuration, and nothing of the server's.
pub fn belongs_in_copy(name: &str) -> bool {
    const OWN: &str = "postgresql.auto.conf";
    members::is_plain(name.as_bytes()) && name.ends_with(".conf") && name != OWN
}

fn same_place(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    real(one) == real(other)
}

/// What a configuration file says; the last line counts.
fn data_directory(text: &[u8]) -> Option<PathBuf> {
    let text = String::from_utf8_lossy(text);
    let value = |line: &str| {
        let (name, rest) = line.trim_start().split_at_checked("data_directory".len())?;
        let rest = rest.trim_start();
        let value = rest.strip_prefix('=').unwrap_or(rest).trim_start().strip_prefix('\'')?;
        name.eq_ignore_ascii_case("data_directory").then(|| PathBuf::from(value.split('\'').next().unwrap_or_default()))
    };
    text.lines().filter_map(value).next_back()
}

/// The captured postgresql.conf, pointed at the copy.
pub fn main_file(captured: &[u8], pgdata: &Path, names: &[&str]) -> Vec<u8> {
    let mut text = captured.to_vec();
    if !text.ends_with(b"\n") {
        text.push(b'\n');
    }
    let place = |name: &str| quoted(&pgdata.join(name).to_string_lossy());
    text.extend_from_slice(b"# By seawall restore: of this data directory, not of the source.\n");
    text.extend_from_slice(format!("data_directory = {}\n", quoted(&pgdata.to_string_lossy())).as_bytes());
    for (setting, name) in [("hba_file", HBA), ("ident_file", IDENT)] {
        if names.contains(&name) {
            text.extend_from_slice(format!("{setting} = {}\n", place(name)).as_bytes());
        }
    }
    text.extend_from_slice(b"external_pid_file = ''\n");
    text
}

/// How the copy is started: one line for a shell.
pub fn start_command(configuration: &Configuration, pgdata: &Path, pg_ctl: &str, user: Option<&str>) -> String {
    let directory = shell_word(&pgdata.to_string_lossy());
    let as_user = user.map(|user| format!("runuser -u {} -- ", shell_word(user))).unwrap_or_default();
    match configuration {
        Configuration::Original(path) => match debian_cluster(path) {
            Some((version, cluster)) => format!("pg_ctlcluster {version} {cluster} start"),
            None => {
                let option = shell_word(&format!("-c config_file={}", shell_word(&path.to_string_lossy())));
                format!("{as_user}{pg_ctl} -D {directory} -o {option} start")
            }
        },
        _ => format!("{as_user}{pg_ctl} -D {directory} start"),
    }
}

/// Version and cluster of `/etc/postgresql/<version>/<cluster>/postgresql.conf`.
fn debian_cluster(path: &Path) -> Option<(String, String)> {
    let below = path.strip_prefix("/etc/postgresql").ok()?;
    let parts: Vec<_> = below.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    match parts.as_slice() {
        [version, cluster, file] if file == MAIN => Some((shell_word(version), shell_word(cluster))),
        _ => None,
    }
}

/// Where a distribution keeps the programs of this major version.
pub fn pg_ctl(major: u32) -> String {
    let places = [format!("/usr/lib/postgresql/{major}/bin/pg_ctl"), format!("/usr/pgsql-{major}/bin/pg_ctl")];
    places.into_iter().find(|path| Path::new(path).exists()).unwrap_or_else(|| "pg_ctl".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::index::Crc32;
    use crate::codec::Form;

    fn entry(name: &str, path: &str) -> ConfigEntry {
        let (name, path) = (name.to_string(), path.to_string());
        ConfigEntry {
            name,
            path,
            form: Form::Plain,
            raw_bytes: 0,
            raw_crc32: Crc32(0),
            stored_bytes: 0,
            stored_crc32: Crc32(0),
        }
    }

    #[test]
    fn the_original_counts_only_where_it_is_this_directorys() {
        let entries = [entry(MAIN, "/etc/postgresql/18/main/postgresql.conf")];
        let pgdata = Path::new("/var/lib/postgresql/18/main");
        let text =
            b"data_directory = '/old'\n#data_directory = '/no'\nData_Directory '/var/lib/postgresql/18/main' # x\n";
        let found = decide(&entries, false, Some(text), pgdata);
        assert_eq!(found, Configuration::Original("/etc/postgresql/18/main/postgresql.conf".into()));
        assert_eq!(start_command(&found, pgdata, "pg_ctl", Some("postgres")), "pg_ctlcluster 18 main start");
        for other in [Some(&b"data_directory = '/elsewhere'"[..]), Some(b"port = 5432"), None] {
            assert_eq!(decide(&entries, false, other, pgdata), Configuration::Captured);
        }
        assert_eq!(decide(&entries, true, Some(text), pgdata), Configuration::Inside);
        assert_eq!(decide(&[entry(HBA, "/x/pg_hba.conf")], false, None, pgdata), Configuration::Nowhere);
    }

    #[test]
    fn the_captured_file_is_pointed_at_the_copy() {
        let found = main_file(b"data_directory = '/live'", Path::new("/my copy"), &[MAIN, HBA]);
        let found = String::from_utf8(found).unwrap();
        assert_eq!(data_directory(found.as_bytes()), Some("/my copy".into()));
        assert!(found.contains("\nhba_file = '/my copy/pg_hba.conf'\n") && !found.contains("ident_file"), "{found}");
    }

    #[test]
    fn the_command_can_be_pasted() {
        let at = Path::new("/my copy");
        let plain = start_command(&Configuration::Inside, at, "pg_ctl", Some("postgres"));
        assert_eq!(plain, "runuser -u postgres -- pg_ctl -D '/my copy' start");
        let elsewhere = Configuration::Original("/conf/18/postgresql.conf".into());
        let found = start_command(&elsewhere, at, "pg_ctl", None);
        assert_eq!(found, "pg_ctl -D '/my copy' -o '-c config_file=/conf/18/postgresql.conf' start");
    }
}

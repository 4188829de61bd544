//! Owns: the password file: its lines, which one matches, when the file is not to be trusted.
//! Does not own: when it is asked (`conninfo`).

use std::io::ErrorKind;
use std::path::Path;

use super::environment::Environment;
use crate::secret::Secret;

/// What a line must match. `host` is the name as given; the default socket directory counts as `localhost`.
pub(super) struct Wanted<'a> {
    pub host: &'a str,
    pub port: u16,
    pub database: &'a str,
    pub user: &'a str,
}

/// A password file as it is right now. It has no lines when it is absent or not trusted.
pub(super) struct Passfile {
    lines: Vec<String>,
}

impl Passfile {
    /// A file that cannot be used is a warning, not an error: the server may not ask for a password.
    pub fn read(path: &Path, environment: &dyn Environment, warnings: &mut Vec<String>) -> Passfile {
        let mut ignored = |why: String| {
            warnings.push(format!("password file {} is ignored: {why}", path.display()));
            Passfile { lines: Vec::new() }
        };
        let content = match environment.read(path) {
            Ok(content) => content,
            Err(error) if error.kind() == ErrorKind::NotFound => return Passfile { lines: Vec::new() },
            Err(error) => return ignored(error.to_string()),
        };
        if content.mode & 0o077 != 0 {
            let mode = content.mode;
            return ignored(format!("mode {mode:04o} lets others use it; run: chmod 0600 {}", path.display()));
        }
        match content.text() {
            Ok(text) => Passfile { lines: text.split('\n').map(|line| line.trim_end_matches('\r').into()).collect() },
            Err(_) => ignored("it is not UTF-8".to_string()),
        }
    }

    /// The password of the first matching line; an empty one counts as none.
    pub fn find(&self, wanted: &Wanted<'_>) -> Option<Secret> {
        let password =
            self.lines.iter().filter(|line| !line.starts_with('#')).find_map(|line| matched(line, wanted))?;
        (!password.is_empty()).then(|| Secret::new(password))
    }
}

/// The password of `line` (`host:port:database:user:password`) if all its fields match.
fn matched(line: &str, wanted: &Wanted<'_>) -> Option<String> {
    let port = wanted.port.to_string();
    let fields = [wanted.host, &port, wanted.database, wanted.user];
    let rest = fields.into_iter().try_fold(line, strip_field)?;
    Some(field(rest).0)
}

/// What follows the line's first field, if that is `token` or `*`.
fn strip_field<'a>(line: &'a str, token: &str) -> Option<&'a str> {
    if let Some(rest) = line.strip_prefix("*:") {
        return Some(rest);
    }
    let (value, rest) = field(line);
    rest.filter(|_| value == token)
}

/// The first field without its escapes (`\:` and `\\`), and what follows its colon.
fn field(line: &str) -> (String, Option<&str>) {
    let mut value = String::new();
    let mut chars = line.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            ':' => return (value, Some(&line[i + 1..])),
            '\\' => match chars.next() {
                Some((_, escaped)) => value.push(escaped),
                None => value.push('\\'),
            },
            c => value.push(c),
        }
    }
    (value, None)
}

#[cfg(test)]
mod tests {
    use super::super::environment::MemoryEnvironment;
    use super::*;

    fn find(text: &str, host: &str, port: u16, database: &str, user: &str) -> Option<String> {
        let environment = MemoryEnvironment::new().with_file("/p", 0o600, text);
        let mut warnings = Vec::new();
        let passfile = Passfile::read(Path::new("/p"), &environment, &mut warnings);
        assert_eq!(warnings, Vec::<String>::new());
        passfile.find(&Wanted { host, port, database, user }).map(|secret| secret.expose().to_string())
    }

    #[test]
    fn first_matching_line_wins() {
        let text = "# db:5432:replication:me:comment\n\nshort\ndb:5433:*:me:other port\n\
                    db:*:replication:me:first\r\n*:*:*:*:second\n";
        assert_eq!(find(text, "db", 5432, "replication", "me").as_deref(), Some("first"));
        assert_eq!(find(text, "db", 5433, "replication", "me").as_deref(), Some("other port"));
        assert_eq!(find(text, "elsewhere", 5432, "x", "you").as_deref(), Some("second"));
    }

    #[test]
    fn all_does_not_mean_replication_but_a_star_does() {
        assert_eq!(find("h:*:all:u:p", "h", 1, "replication", "u"), None);
        assert_eq!(find("h:*:*:u:p", "h", 1, "replication", "u").as_deref(), Some("p"));
    }

    #[test]
    fn fields_are_escaped() {
        assert_eq!(find(r"\:\:1:5432:d:u:p", "::1", 5432, "d", "u").as_deref(), Some("p"));
        assert_eq!(find(r"h:*:a\\b:u\::p", "h", 1, r"a\b", "u:").as_deref(), Some("p"));
        assert_eq!(find(r"h:*:*:u:a\:b\\c\d:rest", "h", 1, "d", "u").as_deref(), Some(r"a:b\cd"));
        assert_eq!(find(r"\*:*:*:u:p", "*", 1, "d", "u").as_deref(), Some("p"));
        assert_eq!(find(r"\*:*:*:u:p", "h", 1, "d", "u"), None);
        assert_eq!(find("h*:*:*:*:p", "hx", 1, "d", "u"), None);
        assert_eq!(find("h:*:*:u: spaces stay ", "h", 1, "d", "u").as_deref(), Some(" spaces stay "));
    }

    #[test]
    fn short_lines_and_empty_passwords_give_none() {
        for line in ["h:*:*:u", "h:*:*:u:", "h", ":", "", "h:*:*"] {
            assert_eq!(find(line, "h", 1, "d", "u"), None, "{line}");
        }
        // First match wins, even when it has nothing to say.
        assert_eq!(find("h:*:*:u:\n*:*:*:*:p", "h", 1, "d", "u"), None);
    }

    #[test]
    fn untrusted_files_are_ignored_with_a_warning() {
        let environment = MemoryEnvironment::new()
            .with_file("/open", 0o640, "*:*:*:*:canary")
            .with_directory("/dir")
            .with_unreadable("/secret");
        for (path, expected) in [("/open", "chmod 0600 /open"), ("/dir", "not a plain file"), ("/secret", "denied")] {
            let mut warnings = Vec::new();
            let passfile = Passfile::read(Path::new(path), &environment, &mut warnings);
            assert!(passfile.lines.is_empty());
            assert!(warnings.len() == 1 && warnings[0].contains(expected), "{warnings:?}");
            assert!(!warnings[0].contains("canary"));
        }
        let mut warnings = Vec::new();
        Passfile::read(Path::new("/absent"), &environment, &mut warnings);
        assert!(warnings.is_empty());
    }
}
